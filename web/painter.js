/** The painting of eDiff-I Paint With Words on ComfyUI's canvas. The only file of the painter that knows ComfyUI. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { isPaintingValue } from "./painter_core.js";
import { PainterEditor } from "./painter_dom.js";

const NODE = "EDiffI_PaintWithWords";
const WIDGET = "EDIFFI_PAINTING";
const SIDE = "ediffi.painting.side";
const SMALLEST_HEIGHT = 392; // of the painting in the node, and its margins
const PROMPT_HEIGHT = 140; // so that a taller node gives its height to the painting
const POLL = 500; // ms
const FRAMES_TO_SETTLE = 6; // after which Nodes 2.0 has put its elements in place

const editors = new WeakMap(); // node -> PainterEditor
const views = new Map(); // what a painting looked like; nodes are made anew by each undo of the workflow

function newView() {
    return { tool: "brush", size: 48, opacity: 70, fit: "cover", phrase: null };
}

/** The tools chosen for a node, for as long as the page lives. */
function viewOf(node, before) {
    if (!node.graph) return before;
    const key = `${node.graph.rootGraph?.id} ${node.graph.id} ${node.id}`;
    if (!views.has(key)) views.set(key, before);
    return views.get(key);
}

/** The value at an input: the widget's, or that of the one widget of its type where a link comes from; else undefined. */
function valueAt(node, name, type) {
    const link = node.inputs?.find(input => input.name === name)?.link;
    if (link == null) return node.widgets?.find(widget => widget.name === name)?.value;
    const origin = originOf(node, link);
    const values = (origin?.widgets ?? []).map(widget => widget.value).filter(value => typeof value === type);
    return values.length === 1 ? values[0] : undefined;
}

function originOf(node, link) {
    const id = (node.graph?.getLink?.(link) ?? node.graph?.links?.[link])?.origin_id;
    return id == null ? null : node.graph.getNodeById(id);
}

/** The box of the prompt. In Nodes 2.0 it is another element than the widget's. */
function selectionIn(node) {
    const { value, element } = node.widgets?.find(widget => widget.name === "text") ?? {};
    const boxes = [element, ...document.querySelectorAll(`[data-node-id="${node.id}"] textarea`)];
    const box = boxes.find(box => box?.isConnected && box.value === value && box.selectionEnd > box.selectionStart);
    return box ? box.value.slice(box.selectionStart, box.selectionEnd) : null;
}

function captureUndo() {
    const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
    if (tracker?.captureCanvasState) tracker.captureCanvasState();
    else tracker?.checkState?.();
}

/** @returns {import("./painter_dom.js").Host} */
function hostOf(node, widget) {
    const ownView = newView();
    return {
        prompt() {
            const text = valueAt(node, "text", "string");
            return { text: String(text ?? ""), linked: text === undefined };
        },
        size: () => ["width", "height"].map(name => Math.max(1, Number(valueAt(node, name, "number")) || 1024)),
        side: () => app.extensionManager?.setting?.get(SIDE) ?? 512,
        view: () => viewOf(node, ownView),
        selection: () => selectionIn(node),
        linkedImage() {
            const link = node.inputs?.find(input => input.name === "image")?.link;
            return (link != null && originOf(node, link)?.imgs?.[0]?.src) || null;
        },
        address: ({ name, subfolder = "", type = "input" }) =>
            api.apiURL(`/view?${new URLSearchParams({ filename: name, subfolder, type })}`),
        async upload(file) {
            const body = new FormData();
            body.append("image", file, file.name ?? "reference.png");
            body.append("subfolder", "ediffi");
            const answer = await api.fetchApi("/upload/image", { method: "POST", body });
            if (!answer.ok) throw new Error(`The server did not take the picture (${answer.status}).`);
            const { name, subfolder, type } = await answer.json();
            return { name, subfolder, type };
        },
        changed(value) {
            widget().callback?.(value);
            node.graph?.setDirtyCanvas?.(true, true);
            queueMicrotask(captureUndo);
        },
        toGraph(event) {
            const handlers = { pointerdown: "Down", pointermove: "Move", pointerup: "Up", wheel: "Wheel" };
            app.canvas?.[`processMouse${handlers[event.type]}`]?.(event);
        },
    };
}

/** The editor of the node that now has this one's place, where an undo of the workflow has replaced the node. */
function successor(node) {
    const now = app.canvas?.graph?.getNodeById(node.id);
    return now && now !== node && node.graph?.getNodeById(node.id) !== node ? editors.get(now) : null;
}

/** Nodes 2.0 of frontend 1.58 goes on showing the element of a node that an undo of the workflow has thrown away. */
function takeItsPlace(editor, node, frames = FRAMES_TO_SETTLE) {
    const shown = node.graph === app.canvas?.graph && document.querySelector(`[data-node-id="${node.id}"] .ediffi-painter`);
    if (shown && shown !== editor.element) shown.replaceWith(editor.element);
    if (frames) requestAnimationFrame(() => takeItsPlace(editor, node, frames - 1));
}

function makeWidget(node, name) {
    const editor = new PainterEditor(hostOf(node, () => widget));
    const widget = node.addDOMWidget(name, WIDGET, editor.element, {
        getValue: () => editor.value,
        setValue: value => { editor.value = value; },
        getMinHeight: () => SMALLEST_HEIGHT,
        hideOnZoom: false,
        hideInPanel: true, // or the panel takes the element from the node
        margin: 6,
    });
    editors.set(node, editor);
    editor.element.addEventListener("pointerdown", event => {
        const living = successor(node);
        if (!living) return;
        event.stopImmediatePropagation();
        event.preventDefault();
        editor.element.replaceWith(living.element);
    }, true);

    const timer = setInterval(() => editor.element.isConnected && editor.poll(), POLL);
    const { onRemove } = widget;
    widget.onRemove = function () {
        clearInterval(timer);
        return onRemove?.call(this);
    };
    return { widget, minWidth: 470, minHeight: 720 };
}

/** Calls `then` after the node's own method. */
function after(node, method, then) {
    const own = node[method];
    node[method] = function (...values) {
        const result = own?.apply(this, values);
        then(...values);
        return result;
    };
}

app.registerExtension({
    name: "ediffi.painter",
    settings: [{
        id: SIDE,
        category: ["eDiff-I", "Painting", "Side"],
        name: "Cells on the longer side of a new painting",
        tooltip: "512 is finer than any attention map. Paintings that exist keep their own.",
        type: "slider",
        attrs: { min: 256, max: 1024, step: 64 },
        defaultValue: 512,
    }],

    init() {
        const href = new URL("./painter.css", import.meta.url).href;
        document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
    },

    getCustomWidgets: () => ({ [WIDGET]: makeWidget }),

    nodeCreated(node) {
        const editor = editors.get(node);
        if (!editor || node.comfyClass !== NODE) return;
        const prompt = node.widgets.find(widget => widget.name === "text");
        if (prompt) prompt.options.getMaxHeight = () => PROMPT_HEIGHT;
        after(node, "onExecuted", output => {
            const [report] = output?.ediffi_painting ?? [];
            if (report) editor.setReport(report);
        });
        after(node, "onConfigure", stored => {
            // Values are restored by their position, which another version may have moved; their names tell.
            const named = stored?.widgets_values_named?.painting;
            if (editor.refused && isPaintingValue(named)) editor.value = named;
            editor.refresh();
            takeItsPlace(editor, node);
        });
    },
});
