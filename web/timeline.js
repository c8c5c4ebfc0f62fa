/**
 * The strip under a sampler's widgets: which expert denoises which step, and how far the run has come.
 *
 * The server tells the plan in "ediffi.timeline" before a run and in a node's output after it (nodes/bridge_timeline.py);
 * ComfyUI's own events tell the steps that are done. Nothing of it is kept in the workflow.
 */

import { app } from "../../scripts/app.js";
import { Told, addWidget, fit, handOn, nodeAt, on, onOutput, widgetOf } from "./under_widgets.js";

const NODES = ["EDiffI_KSampler", "EDiffI_ExpertEnsemble", "EDiffI_SuperResolution"];
const TYPE = "EDIFFI_TIMELINE";
const COLORS = ["#007373", "#a596f5", "#eb8214", "#8c50c8", "#05b996", "#b93719"]; // ediffi_core/timeline.py has the same
const [ROW, LINE] = [20, 16]; // heights in pixels
const MOST_CELLS = 80; // of at least 3 pixels in a node of usual width; longer schedules share cells
const MOST_GAPS = 40;
const STYLE = `
.ediffi-timeline { box-sizing: border-box; overflow: hidden; padding-top: 4px; color: var(--input-text, #ddd); font: 11px/${LINE}px Arial, sans-serif; }
.ediffi-timeline-row { display: flex; gap: 1px; height: ${ROW - 8}px; margin-bottom: 4px; }
.ediffi-timeline-cell { min-width: 1px; }
.ediffi-timeline-cell[data-state="waiting"] { opacity: 0.3; }
.ediffi-timeline-cell[data-state="current"] { outline: 2px solid var(--input-text, #ddd); outline-offset: -2px; }
.ediffi-timeline-line { display: flex; gap: 6px; height: ${LINE}px; white-space: nowrap; }
.ediffi-timeline-swatch { flex: none; width: 9px; height: 9px; margin-top: 4px; }
.ediffi-timeline-name { overflow: hidden; text-overflow: ellipsis; min-width: 3em; }
.ediffi-timeline-facts { overflow: hidden; text-overflow: ellipsis; margin-left: auto; color: var(--descrip-text, #999); }`;

/**
 * @typedef {{name: string, low: number, high: number | null, cfg: number | null}} Expert high null: infinite
 * @typedef {{sigmas: number[], experts: Expert[], plan: number[], range: [number, number]}} Timeline
 * @typedef {{timeline: Timeline, done: number, running: boolean, element?: HTMLElement}} Strip done: steps
 */

const strips = new Told(show);

const short = number => String(Number(number.toPrecision(4)));
const counted = count => `${count} step${count === 1 ? "" : "s"}`;

/** @param {Expert} expert */
function intervalOf({ low, high }) {
    if (high == null) return low > 0 ? `from ${short(low)} up` : "every sigma";
    return low > 0 ? `${short(high)} to ${short(low)}` : `below ${short(high)}`;
}

function make(tag, kind, title, text = "") {
    return Object.assign(document.createElement(tag), { className: `ediffi-timeline-${kind}`, title, textContent: text });
}

/** Neighbouring steps of one expert that share a cell: [first, last], both included. */
function cellsOf(plan) {
    const most = Math.ceil(plan.length / MOST_CELLS);
    const cells = [];
    plan.forEach((expert, step) => {
        const cell = cells.at(-1);
        if (cell && plan[cell[0]] === expert && step - cell[0] < most) cell[1] = step;
        else cells.push([step, step]);
    });
    return cells;
}

/** @param {Strip} strip */
function stepCells({ timeline: { sigmas, experts, plan }, done, running }) {
    return cellsOf(plan).map(([first, last]) => {
        const steps = first === last ? `Step ${first + 1}` : `Steps ${first + 1} to ${last + 1}`;
        const levels = first === last ? short(sigmas[first]) : `${short(sigmas[first])} to ${short(sigmas[last])}`;
        const cell = make("div", "cell", `${steps} of ${plan.length}, sigma ${levels}, ${experts[plan[first]].name}`);
        cell.style.flex = `${last - first + 1} 1 0`;
        cell.style.backgroundColor = COLORS[plan[first] % COLORS.length];
        cell.dataset.expert = plan[first];
        const current = running && first <= done && done <= last;
        cell.dataset.state = current ? "current" : last < done ? "done" : "waiting";
        return cell;
    });
}

/** The part of the noise each expert has, on a logarithmic axis from high to low. @param {Strip} strip */
function bandCells({ timeline: { experts, range: [lowest, highest] } }) {
    return experts.map((expert, number) => {
        const [low, high] = [expert.low, expert.high ?? Infinity].map(edge => Math.min(Math.max(edge, lowest), highest));
        const cell = make("div", "cell", `${expert.name}: sigma ${intervalOf(expert)}`);
        cell.style.flex = `${Math.log(high / low) || 0} 1 0`;
        cell.style.minWidth = "4px";
        cell.style.backgroundColor = COLORS[number % COLORS.length];
        cell.dataset.expert = number;
        return cell;
    });
}

/** @param {Timeline} timeline */
function legend({ experts, plan }) {
    return experts.map((expert, number) => {
        const facts = [intervalOf(expert)];
        if (plan.length) facts.push(counted(plan.filter(one => one === number).length));
        if (expert.cfg != null) facts.push(`cfg ${short(expert.cfg)}`);
        const line = make("div", "line", `${expert.name}: sigma ${facts.join(", ")}`);
        const swatch = make("span", "swatch", "");
        swatch.style.backgroundColor = COLORS[number % COLORS.length];
        line.append(swatch, make("span", "name", "", expert.name), make("span", "facts", "", facts.join(" · ")));
        return line;
    });
}

const heightOf = ({ timeline }) => ROW + LINE * timeline.experts.length;

function newElement() {
    const element = Object.assign(document.createElement("div"), { className: "ediffi-timeline" });
    handOn(element);
    return element;
}

/** @param {Strip} strip */
function newWidget(node, strip) {
    strip.element ??= newElement();
    return addWidget(node, { name: "timeline", type: TYPE, element: strip.element, height: () => heightOf(strip) });
}

/** @param {Strip} strip */
function show(place, strip) {
    const node = nodeAt(place, NODES);
    if (!node) return;
    const widget = widgetOf(node, TYPE) ?? newWidget(node, strip);
    const row = make("div", "row", "");
    row.append(...(strip.timeline.plan.length ? stepCells(strip) : bandCells(strip)));
    if (row.childElementCount > MOST_GAPS) row.style.gap = 0;
    widget.element.replaceChildren(row, ...legend(strip.timeline));
    fit(node, widget, heightOf(strip));
}

function change(place, changes) {
    const strip = strips.now.get(place);
    if (strip || changes.timeline) strips.set(place, Object.assign(strip ?? {}, changes));
}

function advance(place, { value, max }) {
    const strip = strips.now.get(place);
    if (!strip?.running || max !== strip.timeline.plan.length || value === strip.done) return; // loading counts too
    change(place, { done: value });
}

function stop() {
    for (const [place, { running }] of strips.now) if (running) change(place, { running: false });
}

app.registerExtension({
    name: "ediffi.timeline",

    setup() {
        document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
        strips.listen(stop);
        on("ediffi.timeline", ({ node, timeline }) => change(String(node), { timeline, done: 0, running: true }));
        on("progress", detail => advance(String(detail.node), detail));
        on("progress_state", ({ nodes }) => Object.entries(nodes).forEach(([place, state]) => advance(place, state)));
        onOutput("ediffi_timeline", (place, timeline) =>
            change(place, { timeline, done: timeline.plan.length, running: false }));
    },

    afterConfigureGraph() {
        strips.showAll();
    },
});
