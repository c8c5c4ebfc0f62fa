/**
 * The words as each encoder saw them, under the widgets of eDiff-I Text Encode: one line, which opens on click.
 *
 * The server tells them in the node's output (nodes/bridge_tokens.py). Nothing of it is kept in the workflow.
 */

import { app } from "../../scripts/app.js";
import { Told, addWidget, fit, handOn, nodeAt, onOutput, widgetOf } from "./under_widgets.js";
import { beyond, boxes, countOf, isCut, summary } from "./tokens_core.js";

const NODES = ["EDiffI_TextEncode"];
const TYPE = "EDIFFI_TOKENS";
const [HEAD, MOST] = [18, 180]; // heights in pixels; what is taller than MOST is scrolled

/**
 * @typedef {{encoders: import("./tokens_core.js").Encoder[], open?: boolean, height: number, node?: object, element?: HTMLElement}}
 *     Picture  open: what the user chose; height: of the opened part; node: that shows it
 */

const pictures = new Told(show);
/** @type {WeakMap<HTMLElement, Picture>} one node shows several in turn where its subgraph is there several times */
const shownOn = new WeakMap();

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

/** Scrolling and clicks. */
function isOwn(event) {
    const body = event.target.closest(".ediffi-tokens-body");
    return event.type === "wheel" ? body?.scrollHeight > body?.clientHeight : event.target.closest("button");
}

function newElement() {
    const element = Object.assign(document.createElement("div"), { className: "ediffi-tokens" });
    const button = Object.assign(make("button", "summary"), { type: "button" });
    const body = make("div", "body");
    const inner = make("div", "inner");
    body.append(inner);
    element.append(button, body);
    handOn(element, isOwn);
    button.addEventListener("click", () => {
        const picture = shownOn.get(element);
        picture.open = !isOpen(picture);
        fill(picture);
        resize(picture);
    });
    new ResizeObserver(() => {
        if (!inner.offsetHeight) return; // not on the page
        const picture = shownOn.get(element);
        picture.height = Math.min(inner.offsetHeight, MOST);
        resize(picture);
    }).observe(inner);
    return element;
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

/** @param {Picture} picture */
function resize(picture) {
    const widget = widgetOf(picture.node, TYPE);
    if (widget) fit(picture.node, widget, heightOf(picture));
}

/** @param {Picture} picture */
function newWidget(node, picture) {
    const element = picture.element ?? newElement();
    const height = () => heightOf(shownOn.get(element) ?? picture);
    return addWidget(node, { name: "tokens", type: TYPE, element, height });
}

/** @param {Picture} picture */
function show(place, picture) {
    const node = nodeAt(place, NODES);
    if (!node) return;
    const widget = widgetOf(node, TYPE) ?? newWidget(node, picture);
    Object.assign(picture, { node, element: widget.element });
    shownOn.set(widget.element, picture);
    fill(picture);
    resize(picture);
}

function change(place, { encoders }) {
    const picture = pictures.now.get(place) ?? { height: HEAD, encoders };
    if (isCut(encoders) !== isCut(picture.encoders)) picture.open = undefined; // news
    picture.encoders = encoders;
    pictures.set(place, picture);
}

app.registerExtension({
    name: "ediffi.tokens",

    init() {
        const href = new URL("./tokens.css", import.meta.url).href;
        document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
    },

    setup() {
        pictures.listen();
        onOutput("ediffi_tokens", change);
    },

    afterConfigureGraph() {
        pictures.showAll();
    },
});
