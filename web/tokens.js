/**
 * The words as each encoder saw them, under the widgets of eDiff-I Text Encode: one line, which opens on click.
 *
 * The server tells them in the node's output (nodes/bridge_tokens.py). Nothing of it is kept in the workflow.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { beyond, boxes, countOf, isCut, summary } from "./tokens_core.js";

const NODES = ["EDiffI_TextEncode"];
const TYPE = "EDIFFI_TOKENS"; // no built-in widget's, or Nodes 2.0 would show that one instead
const [HEAD, MOST, MARGIN] = [18, 180, 6]; // heights in pixels; what is taller than MOST is scrolled

/**
 * @typedef {{encoders: import("./tokens_core.js").Encoder[], open?: boolean, height: number, node?: object, element?: HTMLElement}}
 *     Picture  open: what the user chose; height: of the opened part; node: that shows it
 */

/** @type {Map<string, Map<string, Picture>>} graph of a workflow -> number of a node as the server writes it -> its picture */
const workflows = new Map();
/** @type {WeakMap<HTMLElement, Picture>} one node shows several in turn where its subgraph is there several times */
const shownOn = new WeakMap();
let runs = null; // graph of the workflow that runs; another one may be on the canvas

function make(tag, kind, text = "", title = "") {
    return Object.assign(document.createElement(tag), { className: `ediffi-tokens-${kind}`, textContent: text, title });
}

function boxElement({ text, weight, tint, cut, title }) {
    const element = make("span", "box", text, title);
    element.dataset.tint = tint;
    if (cut) element.dataset.cut = "";
    if (weight) element.append(make("span", "weight", weight));
    return element;
}

/** @param {import("./tokens_core.js").Encoder} encoder */
function encoderElement(encoder) {
    const element = make("div", "encoder");
    element.append(make("div", "name", `${encoder.name} ${countOf(encoder)}`));
    const lists = boxes(encoder);
    const { read, cut } = beyond(encoder);
    lists.forEach((list, index) => {
        const hidden = index === lists.length - 1 ? cut : index === lists.length - 2 ? read : 0;
        if (!list.length && !hidden) return;
        const chunk = make("div", "chunk");
        chunk.append(...list.map(boxElement));
        if (hidden) chunk.append(make("span", "more", ` and ${hidden} more`));
        element.append(chunk);
    });
    element.append(...encoder.notes.map(note => make("div", "note", note)));
    return element;
}

const isOpen = ({ encoders, open }) => encoders.length > 0 && (open ?? isCut(encoders));
const heightOf = picture => HEAD + (isOpen(picture) ? picture.height : 0);
const inNodes2 = () => Boolean(globalThis.LiteGraph?.vueNodesMode);

function nodeAt(place) {
    let graph = app.rootGraph ?? app.graph;
    let node = null;
    for (const number of place.split(":")) {
        node = graph?.getNodeById(number);
        graph = node?.subgraph;
    }
    return NODES.includes(node?.comfyClass) ? node : null;
}

const HANDED_ON = {
    pointerdown: "processMouseDown",
    pointermove: "processMouseMove",
    pointerup: "processMouseUp",
    wheel: "processMouseWheel",
};

/** The classic canvas lies under the picture: what is no tooltip, click or scrolling is meant for it. */
function handOn(event) {
    const body = event.target.closest(".ediffi-tokens-body");
    const own = event.type === "wheel" ? body?.scrollHeight > body?.clientHeight : event.target.closest("button");
    if (inNodes2() || own) return;
    app.canvas?.[HANDED_ON[event.type]]?.(event);
}

function newElement() {
    const element = Object.assign(document.createElement("div"), { className: "ediffi-tokens" });
    const button = Object.assign(make("button", "summary"), { type: "button" });
    const body = make("div", "body");
    const inner = make("div", "inner");
    body.append(inner);
    element.append(button, body);
    Object.keys(HANDED_ON).forEach(type => element.addEventListener(type, handOn));
    button.addEventListener("click", () => {
        const picture = shownOn.get(element);
        picture.open = !isOpen(picture);
        fill(picture);
        fit(picture);
    });
    new ResizeObserver(() => {
        if (!inner.offsetHeight) return; // not on the page
        const picture = shownOn.get(element);
        picture.height = Math.min(inner.offsetHeight, MOST);
        fit(picture);
    }).observe(inner);
    return element;
}

/** Made with the first picture, so that a node which never ran is as ComfyUI made it. @param {Picture} picture */
function addWidget(node, picture) {
    picture.element ??= newElement(); // kept when undo makes the node anew: Nodes 2.0 goes on showing the old element
    const { element } = picture;
    const height = () => heightOf(shownOn.get(element) ?? picture) + 2 * MARGIN;
    const widget = node.addDOMWidget("tokens", TYPE, element, {
        serialize: false, // in the prompt
        hideOnZoom: false,
        hideInPanel: true,
        margin: MARGIN,
        getValue: () => "",
        setValue: () => {},
        getMinHeight: height,
        getMaxHeight: height,
    });
    widget.serialize = false; // in the workflow, which must not know the node's growth either
    const { onSerialize } = node;
    node.onSerialize = function (saved) {
        onSerialize?.call(this, saved);
        saved.size = [saved.size[0], saved.size[1] - widget.grown];
    };
    widget.grown = 0;
    return widget;
}

/** @param {Picture} picture */
function fill(picture) {
    const { encoders, element } = picture;
    const [button, body] = element.children;
    const open = isOpen(picture);
    element.classList.toggle("ediffi-tokens-warning", isCut(encoders));
    button.textContent = button.title = summary(encoders);
    button.disabled = !encoders.length;
    button.setAttribute("aria-expanded", String(open));
    body.hidden = !open;
    body.firstChild.replaceChildren(...(open ? encoders.map(encoderElement) : []));
}

/** The node grows by exactly what saving takes off, even where it had room to spare. @param {Picture} picture */
function fit(picture) {
    const { node, element } = picture;
    const widget = node?.widgets?.find(widget => widget.type === TYPE);
    if (!widget) return;
    const height = heightOf(picture);
    const grown = height + 2 * MARGIN + 4; // 4: between widgets
    element.style.height = element.style.minHeight = `${height}px`;
    if (grown === widget.grown) return;
    node.setSize([node.size[0], node.size[1] + grown - widget.grown]);
    widget.grown = grown;
    node.graph?.setDirtyCanvas(true, true);
}

/** @param {Picture} picture */
function show(place, picture) {
    const node = nodeAt(place);
    if (!node) return;
    const widget = node.widgets?.find(widget => widget.type === TYPE) ?? addWidget(node, picture);
    Object.assign(picture, { node, element: widget.element });
    shownOn.set(widget.element, picture);
    fill(picture);
    fit(picture);
}

const onCanvas = () => (app.rootGraph ?? app.graph)?.id;

function change(place, encoders) {
    const graph = runs ?? onCanvas();
    if (!workflows.has(graph)) workflows.set(graph, new Map());
    const pictures = workflows.get(graph);
    const picture = pictures.get(place) ?? { height: HEAD, encoders };
    if (isCut(encoders) !== isCut(picture.encoders)) picture.open = undefined; // news
    picture.encoders = encoders;
    pictures.set(place, picture);
    if (graph === onCanvas()) show(place, picture);
}

app.registerExtension({
    name: "ediffi.tokens",

    init() {
        const href = new URL("./tokens.css", import.meta.url).href;
        document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
    },

    setup() {
        const on = (type, then) => api.addEventListener(type, ({ detail }) => then(detail));
        on("execution_start", () => { runs = onCanvas(); });
        on("executed", ({ node, display_node, output }) => {
            const [report] = output?.ediffi_tokens ?? [];
            if (report) change(String(display_node || node), report.encoders);
        });
        ["execution_success", "execution_error", "execution_interrupted", "reconnecting"].forEach(type =>
            on(type, () => { runs = null; }));
    },

    /** Another workflow on the canvas, or the same after an undo. */
    afterConfigureGraph() {
        workflows.get(onCanvas())?.forEach((picture, place) => show(place, picture));
    },
});
