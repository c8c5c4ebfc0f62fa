/**
 * An element under the widgets of a node, which shows what the server told about it: where it stands, how the node makes
 * room for it, and what was told in which workflow. Nothing of it is kept in the workflow.
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const MARGIN = 6; // pixels around the element
const HANDED_ON = {
    pointerdown: "processMouseDown",
    pointermove: "processMouseMove",
    pointerup: "processMouseUp",
    wheel: "processMouseWheel",
};

const inNodes2 = () => Boolean(globalThis.LiteGraph?.vueNodesMode);

/** The workflow on the canvas. */
export const onCanvas = () => (app.rootGraph ?? app.graph)?.id;

/** The node of one of these kinds at a place as the server writes it, "3" or, in a subgraph, "7:3"; null where there is none. */
export function nodeAt(place, kinds) {
    let graph = app.rootGraph ?? app.graph;
    let node = null;
    for (const number of place.split(":")) {
        node = graph?.getNodeById(number);
        graph = node?.subgraph;
    }
    return kinds.includes(node?.comfyClass) ? node : null;
}

/** The classic canvas lies under the element: events that are not the element's own are meant for it. */
export function handOn(element, isOwn = () => false) {
    for (const [type, method] of Object.entries(HANDED_ON))
        element.addEventListener(type, event => {
            if (!inNodes2() && !isOwn(event)) app.canvas?.[method]?.(event);
        });
}

export const widgetOf = (node, type) => node?.widgets?.find(widget => widget.type === type);

/**
 * Make it with the first thing to show, so that a node which never ran is as ComfyUI made it.
 *
 * @param {{name: string, type: string, element: HTMLElement, height: () => number}} what type: no built-in widget's, or Nodes
 *     2.0 would show that one instead; element: the same again when undo makes the node anew, as Nodes 2.0 goes on showing it
 */
export function addWidget(node, { name, type, element, height }) {
    const whole = () => height() + 2 * MARGIN;
    const widget = node.addDOMWidget(name, type, element, {
        serialize: false, // in the prompt
        hideOnZoom: false,
        hideInPanel: true,
        margin: MARGIN,
        getValue: () => "",
        setValue: () => {},
        getMinHeight: whole,
        getMaxHeight: whole,
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

/** The node grows by exactly what saving takes off, even where it had room to spare. */
export function fit(node, widget, height) {
    const grown = height + 2 * MARGIN + 4; // 4: between widgets
    widget.element.style.height = widget.element.style.minHeight = `${height}px`;
    if (grown === widget.grown) return;
    node.setSize([node.size[0], node.size[1] + grown - widget.grown]);
    widget.grown = grown;
    node.graph?.setDirtyCanvas(true, true);
}

/** What was told of the nodes of each workflow: another one may be on the canvas than the one that runs. */
export class Told {
    #workflows = new Map(); // graph of a workflow -> place of a node -> what was told of it
    #runs = null; // graph of the workflow that runs

    /** @param {(place: string, told: object) => void} show called for a node of the workflow on the canvas */
    constructor(show) {
        this.show = show;
    }

    /** Listen to the server; `ended` is called before a run is over. */
    listen(ended = () => {}) {
        on("execution_start", () => { this.#runs = onCanvas(); });
        ["execution_success", "execution_error", "execution_interrupted", "reconnecting"].forEach(type => on(type, () => {
            ended();
            this.#runs = null;
        }));
    }

    /** Of the workflow that runs, or of the one on the canvas. */
    get now() {
        const graph = this.#runs ?? onCanvas();
        if (!this.#workflows.has(graph)) this.#workflows.set(graph, new Map());
        return this.#workflows.get(graph);
    }

    set(place, told) {
        this.now.set(place, told);
        if (this.now === this.#workflows.get(onCanvas())) this.show(place, told);
    }

    /** Another workflow on the canvas, or the same after an undo. */
    showAll() {
        this.#workflows.get(onCanvas())?.forEach((told, place) => this.show(place, told));
    }
}

/** Call with the details of the server's events of a type. */
export const on = (type, then) => api.addEventListener(type, ({ detail }) => then(detail));

/** Call with the place of a node, and what it put out under a key for the canvas. */
export function onOutput(key, then) {
    on("executed", ({ node, display_node, output }) => {
        const [shown] = output?.[key] ?? [];
        if (shown) then(String(display_node || node), shown);
    });
}
