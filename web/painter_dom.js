/**
 * The painting editor as one element. It knows nothing of ComfyUI: what it needs of the node comes through `host`.
 *
 * @typedef {object} Host
 * @property {() => {text: string, linked: boolean}} prompt  the prompt; linked and "" where only a run can tell it
 * @property {() => [number, number]} size  width and height of the picture
 * @property {() => number} side  cells on the longer side of a new grid
 * @property {() => object} view  {tool, size, opacity, fit, phrase}, kept by the host for as long as the page lives
 * @property {() => string | null} selection  what is selected in the prompt's box
 * @property {() => string | null} linkedImage  address of the picture at the image input, where it is known
 * @property {(stored: {name, subfolder, type}) => string} address  of a picture on the server
 * @property {(file: Blob) => Promise<{name, subfolder, type}>} upload
 * @property {(value: string) => void} changed  after each change by the user
 * @property {(event: PointerEvent | WheelEvent) => void} toGraph  lets the canvas behind handle an event
 */

import {
    clamp, gridSize, History, inkOn, isPaintingValue, occurrences, Painting, phraseText, plainText, spans, words,
} from "./painter_core.js";

const SMALLEST = 1 / 256; // of the picture: less than one cell of a 16 x 16 attention map

const TEXT = {
    brush: "Brush (B). Hold Shift for a straight line, the right button to erase",
    erase: "Eraser (E)",
    fill: "Fill an area (G)",
    rectangle: "Rectangle (R)",
    lasso: "Lasso (L)",
    size: "Brush size ([ and ])",
    opacity: "Opacity of the painting",
    overlap: "Let phrases overlap",
    undo: "Undo (Ctrl+Z)",
    redo: "Redo (Ctrl+Y)",
    clear: "Clear the phrase's area",
    menu: "More: fill the rest, invert, masks, reference",
    larger: "Larger editor",
    smaller: "Back to the node (Escape)",
    words: "Words of the prompt. Click one, or drag over several, to paint them. Alt+click takes one word out of a phrase. "
        + "By keyboard: arrows, Shift+arrows, Enter",
    canvas: "Painting. Arrows move, Space starts and ends a stroke, 1 to 9 choose a phrase, X the one before",
    choose: "Choose words of the prompt above, then paint where they should appear.",
    noPrompt: "Write a prompt, then choose words of it here.",
    linked: "The prompt comes through a link. Run once to see its words here.",
    lastRun: "The prompt comes through a link; these are the words of the last run.",
    hidden: text => `"${text}" is switched off. Open its eye to paint it.`,
    full: "A painting holds at most 32 phrases.",
    problem: reason => `This painting cannot be shown. ${reason} It is kept as it is.`,
    startOver: "Start over with an empty painting",
    unpainted: part => `${percent(part)} unpainted`,
    fillRest: text => `Fill the rest with "${text}"`,
    nothing: "Nothing painted: no effect",
    tiny: "Very small: coarse layers hardly see it",
    missing: "Not in the prompt",
    found: tokens => `${tokens} ${tokens === 1 ? "token" : "tokens"}`,
    foundTitle: "Found in the prompt of the last run",
    notFound: "Not found in the prompt of the last run",
    rename: "Choose other words for it",
    renaming: text => `Choose the words that "${text}" should become.`,
    invert: text => `Invert "${text}"`,
    copyTo: text => `Copy its area to "${text}"`,
    up: "Move up",
    down: "Move down",
    remove: "Remove",
    selected: "Paint the text selected in the prompt",
    nothingSelected: "Select text in the prompt box first.",
    importMask: text => `Load a mask into "${text}"…`,
    asMask: text => `Use as the area of "${text}"`,
    exportMask: text => `Save the area of "${text}"`,
    exportMap: "Save a map of all colours",
    reference: "Load a reference picture…",
    asReference: "Use as the reference picture",
    noReference: "Remove the reference picture",
    fit: "Show the whole reference",
    cover: "Let the reference cover the canvas",
    lost: "The reference picture is not on this server.",
    unreadable: "This picture cannot be read.",
    strength: "Strength",
    color: "Colour",
    eye: "Used, or switched off",
    nth: "Which occurrence",
    every: "all",
    row: "More for this phrase",
};

const ICONS = {
    brush: "M3 13c2 0 3-1 3-2.5L12.5 3 14 4.5 6.8 11C6.5 13 5 13.5 3 13z",
    erase: "M6 13h8M2.5 9.5 9 3l4.5 4.5L8 13H6zM6 6l4.5 4.5",
    fill: "M2.5 8 7.5 3l5 5-5 5zM7.5 3 6 1.5M2.5 8h10M14 10.5c.7 1 .9 1.5.9 2a.9.9 0 0 1-1.8 0c0-.5.2-1 .9-2z",
    rectangle: "M2.5 4h2M6.5 4h3M11.5 4h2v2M13.5 8v4h-2M9.5 12h-3M4.5 12h-2V9.5M2.5 7.5V4",
    lasso: "M8 2.5c3.5 0 6 1.6 6 3.7S11.5 10 8 10 2 8.3 2 6.2s2.5-3.7 6-3.7zM5 9.5c-1.5.8-1.5 2.3 0 2.5s1 1.5 0 2",
    overlap: "M2.5 2.5H10V10H2.5zM6 6h7.5v7.5H6z",
    undo: "M6 3 2.5 6.5 6 10M2.5 6.5H10a3.5 3.5 0 0 1 0 7H6",
    redo: "M10 3l3.5 3.5L10 10M13.5 6.5H6a3.5 3.5 0 0 0 0 7h4",
    clear: "M3 4.5h10M6.5 4.5V3h3v1.5M4.5 4.5l.5 9h6l.5-9M7 7v4M9 7v4",
    menu: "M3.5 8h.01M8 8h.01M12.5 8h.01",
    larger: "M9.5 2.5h4v4M13.5 2.5 9 7M6.5 13.5h-4v-4M2.5 13.5 7 9",
    eye: "M1.5 8S4 3.5 8 3.5 14.5 8 14.5 8 12 12.5 8 12.5 1.5 8 1.5 8zM8 6a2 2 0 1 0 0 4 2 2 0 0 0 0-4z",
    eyeOff: "M1.5 8S4 3.5 8 3.5 14.5 8 14.5 8 12 12.5 8 12.5 1.5 8 1.5 8zM3 13 13 3",
};

const TOOLS = { b: "brush", e: "erase", g: "fill", r: "rectangle", l: "lasso" }; // by their keys
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const PEN_ERASER = 32; // in PointerEvent.buttons

function percent(part) {
    return part > 0 && part < 0.01 ? "<1 %" : `${Math.round(part * 100)} %`;
}

function element(tag, properties = {}, ...children) {
    const { attributes = {}, ...rest } = properties;
    const made = Object.assign(document.createElement(tag), rest);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
}

function svg(tag, attributes, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
}

function button(name, label, action) {
    const icon = svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
    const made = element("button", { type: "button", title: label, attributes: { "aria-label": label } }, icon);
    made.addEventListener("click", () => action(made));
    return made;
}

function slider(label, low, high, action) {
    const attributes = { "aria-label": label };
    const made = element("input", { type: "range", min: low, max: high, title: label, attributes });
    made.addEventListener("input", () => action(Number(made.value)));
    return made;
}

function pickPicture() {
    return new Promise(resolve => {
        const picker = element("input", { type: "file", accept: "image/*" });
        picker.addEventListener("change", () => resolve(picker.files[0]));
        picker.click();
    });
}

/** (index) => whether a picture, scaled to the grid, is bright there; opaque there if it has transparency. */
async function brightness(file, width, height) {
    const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
    context.drawImage(await createImageBitmap(file), 0, 0, width, height);
    const { data } = context.getImageData(0, 0, width, height);
    const transparent = data.some((value, i) => i % 4 === 3 && value < 255);
    return i => {
        const [r, g, b, a] = data.subarray(4 * i, 4 * i + 4);
        return (transparent ? a : 0.299 * r + 0.587 * g + 0.114 * b) >= 128;
    };
}

export class PainterEditor {
    #value = "";
    #history = new History();
    #seen = ""; // prompt, size and linked picture at the last look
    #stroke = null; // {pointer, pen, tool, points}
    #cursor = null; // where the pointer or the arrow keys are, in cells
    #end = null; // of the last stroke, for straight lines
    #zoom = { scale: 1, x: 0, y: 0 }; // in the large editor
    #chosen = [0, 0]; // first and last word under the hand
    #renaming = null; // the phrase that takes the words chosen next
    #note = ""; // said until the next change
    #frame = 0;

    /** @param {Host} host */
    constructor(host) {
        this.host = host;
        this.problem = ""; // why the value cannot be shown
        this.refused = false; // whether the last value from outside was no painting
        this.report = null; // of the last run
        this.#build();
        this.painting = this.#blank();
        this.refresh();
    }

    get value() {
        return this.#value;
    }

    /** From outside: a workflow, a paste, the workflow's undo. */
    set value(value) {
        this.refused = !isPaintingValue(value);
        if (this.refused || value === this.#value) return;
        this.#history = new History();
        this.#show(value);
    }

    get active() {
        const { phrases } = this.painting;
        return phrases.find(phrase => phrase.id === this.host.view().phrase) ?? phrases[0] ?? null;
    }

    /** Look whether the node around has changed; called now and then. */
    poll() {
        if (!this.#stroke && this.#surroundings() !== this.#seen) this.refresh();
    }

    #surroundings() {
        return JSON.stringify([this.host.prompt(), this.host.size(), this.host.linkedImage()]);
    }

    setReport(report) {
        this.report = report;
        this.refresh();
    }

    // the value

    #blank() {
        return new Painting(...this.#shape());
    }

    /** [width, height] in cells of a grid with the shape of the picture. */
    #shape() {
        return gridSize(...this.host.size(), this.host.side());
    }

    #show(value) {
        this.#value = value;
        this.#stroke = this.#renaming = null;
        this.problem = "";
        this.painting = this.#blank();
        try {
            if (value) this.painting = Painting.parse(value);
        } catch (error) {
            this.problem = error.message;
        }
        this.refresh();
    }

    /** Stores what has been done to `painting` as one step. */
    #commit() {
        const before = this.#value;
        this.#value = String(this.painting);
        this.#note = "";
        if (this.#value !== before) {
            this.#history.record(before);
            this.host.changed(this.#value);
        }
        this.refresh();
    }

    #edit(change) {
        if (this.problem) return;
        change(this.painting);
        this.#commit();
    }

    #travel(direction) {
        const value = this.#history[direction](this.#value);
        if (value === undefined) return;
        this.#show(value);
        this.host.changed(value);
    }

    #startOver() {
        this.#history.record(this.#value);
        this.#show("");
        this.host.changed("");
    }

    // building

    #build() {
        this.strip = element("div", { className: "ediffi-words", tabIndex: 0 });
        this.strip.setAttribute("role", "group");
        this.strip.setAttribute("aria-label", TEXT.words);
        this.canvas = element("canvas");
        this.overlay = svg("svg", { class: "ediffi-overlay", "aria-hidden": "true" });
        this.frame = element("div", { className: "ediffi-frame" }, this.canvas, this.overlay);
        // Takes the focus while painting: ComfyUI leaves the keys of an <input> alone, Ctrl+Z too.
        this.sink = element("input", { className: "ediffi-sink", readOnly: true });
        this.sink.setAttribute("aria-label", TEXT.canvas);
        this.stage = element("div", { className: "ediffi-stage" }, this.sink, this.frame);
        this.table = element("div", { className: "ediffi-table", attributes: { role: "list" } });
        this.status = element("div", { className: "ediffi-status", attributes: { role: "status" } });
        this.menu = element("div", { className: "ediffi-menu", popover: "auto" });
        this.element = element(
            "div", { className: "ediffi-painter" },
            this.strip, this.#toolbar(), this.stage, this.table, this.status, this.menu,
        );
        this.element.dataset.captureWheel = "true"; // Nodes 2.0 then leaves the wheel to us
        this.#listen();
        new ResizeObserver(() => this.#fit()).observe(this.stage);
    }

    #toolbar() {
        const set = change => value => {
            change(this.host.view(), value);
            this.refresh();
        };
        const tool = name => button(name, TEXT[name], () => set(view => { view.tool = name; })());
        this.tools = Object.fromEntries(Object.values(TOOLS).map(name => [name, tool(name)]));
        this.size = slider(TEXT.size, 1, 256, set((view, value) => { view.size = value; }));
        this.opacity = slider(TEXT.opacity, 10, 100, set((view, value) => { view.opacity = value; }));
        const toggle = painting => { painting.overlap = !painting.overlap; };
        this.overlap = button("overlap", TEXT.overlap, () => this.#edit(toggle));
        this.undo = button("undo", TEXT.undo, () => this.#travel("undo"));
        this.redo = button("redo", TEXT.redo, () => this.#travel("redo"));
        this.clear = button("clear", TEXT.clear, () => this.#edit(painting => painting.clear(this.active)));
        this.larger = button("larger", TEXT.larger, () => this.#resize());
        const bar = element(
            "div", { className: "ediffi-tools", attributes: { role: "toolbar" } },
            ...Object.values(this.tools), this.size, this.overlap, this.opacity, this.undo, this.redo, this.clear,
            button("menu", TEXT.menu, from => this.#openMenu(this.#mainMenu(), from.getBoundingClientRect())),
            this.larger,
        );
        bar.addEventListener("click", event => event.detail && this.#focus()); // by mouse; by keyboard the focus stays
        return bar;
    }

    #listen() {
        const { element: root, frame, strip, sink } = this;
        for (const type of ["pointerdown", "pointermove", "pointerup", "mousedown", "click", "dblclick", "contextmenu"]) {
            root.addEventListener(type, event => event.stopPropagation()); // or the node is dragged
        }
        root.addEventListener("keydown", event => event.ctrlKey || event.metaKey || event.stopPropagation());
        root.addEventListener("wheel", event => this.#wheel(event), { passive: false });
        root.addEventListener("dragover", event => this.#takePicture(event, event.dataTransfer));
        root.addEventListener("drop", event => this.#takePicture(event, event.dataTransfer));
        root.addEventListener("paste", event => this.#takePicture(event, event.clipboardData));

        frame.addEventListener("pointerdown", event => this.#pointerDown(event));
        frame.addEventListener("pointermove", event => this.#pointerMove(event));
        frame.addEventListener("pointerleave", () => this.#stroke || this.#aim(null));
        for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
            frame.addEventListener(type, event => this.#pointerUp(event));
        }
        frame.addEventListener("contextmenu", event => event.preventDefault());
        sink.addEventListener("keydown", event => this.#key(event));
        sink.addEventListener("blur", () => this.#stroke?.pointer === null && this.#release());

        strip.addEventListener("pointerdown", event => this.#dragWords(event));
        strip.addEventListener("keydown", event => this.#keyWords(event));
        // The browser's answer to mousedown would move the focus to the graph, whose Ctrl+Z is the workflow's.
        for (const part of [frame, strip]) part.addEventListener("mousedown", event => event.preventDefault());
    }

    #focus() {
        this.sink.focus({ preventScroll: true });
    }

    // showing

    refresh() {
        this.#seen = this.#surroundings();
        const view = this.host.view();
        const { text, linked } = this.host.prompt();
        this.plain = plainText(linked ? this.report?.text ?? "" : text);
        this.words = words(this.plain.text);
        this.linked = linked;

        for (const [tool, made] of Object.entries(this.tools)) made.setAttribute("aria-pressed", tool === view.tool);
        this.overlap.setAttribute("aria-pressed", this.painting.overlap);
        this.clear.disabled = !this.active;
        this.undo.disabled = !this.#history.past.length;
        this.redo.disabled = !this.#history.future.length;
        [this.size.value, this.opacity.value] = [view.size, view.opacity];
        this.extents = new Map(this.painting.phrases.map(phrase => [phrase, this.painting.extent(phrase)]));
        this.#showWords();
        this.#showTable();
        this.#showStatus();
        this.#showReference();
        this.#fit();
        this.#draw();
    }

    #showWords() {
        const { text } = this.plain;
        const found = this.painting.phrases.flatMap((phrase, i) =>
            spans(text, phrase).map(span => ({ ...span, phrase, number: i + 1 })));
        found.sort((a, b) => a.end - a.start - (b.end - b.start)); // the closest phrase colours a word
        const parts = [];
        let position = 0;
        this.words.forEach((word, i) => {
            const span = found.find(({ start, end }) => start <= word.start && word.end <= end);
            const made = element("span", { className: "ediffi-word", textContent: word.text });
            made.dataset.word = i;
            if (span) {
                made.style.cssText = `background:${span.phrase.color};color:${inkOn(span.phrase.color)}`;
                made.classList.toggle("ediffi-active", span.phrase === this.active);
                if (word.start === span.start) made.dataset.number = span.number;
            }
            parts.push(text.slice(position, word.start), made);
            position = word.end;
        });
        this.strip.replaceChildren(...parts, text.slice(position));
    }

    #showTable() {
        const focused = document.activeElement?.dataset.key;
        this.table.replaceChildren(...this.painting.phrases.map((phrase, i) => this.#row(phrase, i)));
        const { offsetTop = 0, offsetHeight = 0 } = this.table.querySelector(".ediffi-active") ?? {};
        const { clientHeight, scrollTop } = this.table;
        this.table.scrollTop = clamp(scrollTop, offsetTop + offsetHeight - clientHeight, offsetTop);
        if (focused) [...this.table.querySelectorAll("[data-key]")].find(part => part.dataset.key === focused)?.focus();
    }

    #row(phrase, index) {
        const all = occurrences(this.plain.text, phrase.text);
        const missing = this.plain.text && !spans(this.plain.text, phrase).length;
        const change = (key, value) => this.#edit(() => { phrase[key] = value; });
        const labelled = (tag, label, properties) =>
            element(tag, { title: label, ...properties, attributes: { "aria-label": `${label}: ${phrase.text}` } });

        const color = labelled("input", TEXT.color, { type: "color", value: phrase.color });
        color.addEventListener("change", () => change("color", color.value));
        const swatch = element("label", { className: "ediffi-swatch", textContent: index + 1 }, color);
        swatch.style.cssText = `background:${phrase.color};color:${inkOn(phrase.color)}`;

        const name = element("button", { type: "button", className: "ediffi-name", textContent: phrase.text });
        name.title = phrase.text;
        name.addEventListener("click", () => this.#activate(phrase));

        const nth = labelled("select", TEXT.nth, { hidden: all.length < 2 && phrase.nth === null });
        const count = Math.max(all.length, phrase.nth ?? 0);
        nth.append(new Option(TEXT.every, ""));
        for (let i = 1; i <= count; i++) nth.append(new Option(`${i}.`, i));
        nth.value = phrase.nth ?? "";
        nth.addEventListener("change", () => change("nth", nth.value ? Number(nth.value) : null));

        const range = { type: "number", min: 0, max: 100, step: 0.1 };
        const strength = labelled("input", TEXT.strength, { ...range, value: phrase.strength });
        strength.addEventListener("change", () => change("strength", clamp(Number(strength.value) || 0, 0, 100)));

        const eye = button(phrase.on ? "eye" : "eyeOff", `${TEXT.eye}: ${phrase.text}`, () => change("on", !phrase.on));
        eye.setAttribute("aria-pressed", phrase.on);
        const more = button("menu", `${TEXT.row}: ${phrase.text}`, from =>
            this.#openMenu(this.#rowMenu(phrase, index), from.getBoundingClientRect()));

        const { coverage } = this.extents.get(phrase);
        const controls = { color, name, nth, strength, eye, more };
        for (const [key, control] of Object.entries(controls)) control.dataset.key = `${phrase.id}:${key}`;
        const run = this.report?.phrases?.find(({ id, text }) => id === phrase.id && text === phrase.text);
        const found = run?.found && !missing ? TEXT.found(run.tokens) : "";
        const row = element(
            "div", { className: "ediffi-row", attributes: { role: "listitem" } },
            swatch, name, element("small", { className: "ediffi-found", textContent: found, title: TEXT.foundTitle }),
            nth, element("span", { className: "ediffi-part", textContent: percent(coverage) }), strength, eye, more,
        );
        row.classList.toggle("ediffi-active", phrase === this.active);
        row.classList.toggle("ediffi-missing", missing);
        row.classList.toggle("ediffi-off", !phrase.on);
        const faults = this.#faults(run, coverage, missing);
        if (faults) row.append(element("small", { className: "ediffi-faults", textContent: faults }));
        return row;
    }

    /** What is wrong with a phrase now, or what the last run says is. */
    #faults(run, coverage, missing) {
        const faults = [];
        if (missing) faults.push(TEXT.missing);
        else if (run && !run.found) faults.push(run.note || TEXT.notFound);
        if (!coverage) faults.push(TEXT.nothing);
        else if (run?.found && run.note) faults.push(run.note);
        else if (coverage < SMALLEST) faults.push(TEXT.tiny);
        return faults.join(". ");
    }

    #showStatus() {
        const { phrases, unpainted } = this.painting;
        let said = this.#note;
        if (this.problem) said = TEXT.problem(this.problem);
        else if (this.#renaming) said = TEXT.renaming(this.#renaming.text);
        else if (!said && this.linked) said = this.plain.text ? TEXT.lastRun : TEXT.linked;
        else if (!said && !this.plain.text) said = TEXT.noPrompt;
        else if (!said) said = phrases.length ? TEXT.unpainted(unpainted) : TEXT.choose;
        if (this.status.textContent !== said) this.status.textContent = said;
        this.status.classList.toggle("ediffi-problem", Boolean(this.problem));
    }

    #say(note) {
        this.#note = note;
        this.#showStatus();
    }

    #showReference() {
        const run = this.report?.reference;
        const reference = run ? { ...run, name: run.filename } : this.painting.rest.reference;
        const address = this.host.linkedImage() ?? (reference && this.host.address(reference));
        this.frame.style.backgroundSize = this.host.view().fit;
        if (address === this.shownReference) return;
        this.shownReference = address;
        this.frame.style.backgroundImage = "";
        if (!address) return;
        const picture = new Image();
        picture.onload = () => {
            if (address === this.shownReference) this.frame.style.backgroundImage = `url(${JSON.stringify(address)})`;
        };
        picture.onerror = () => this.#say(TEXT.lost);
        picture.src = address;
    }

    #fit() {
        const [width, height] = this.#shape();
        const scale = Math.min(this.stage.clientWidth / width, this.stage.clientHeight / height);
        if (!(scale > 0)) return;
        const { x, y, scale: zoom } = this.#zoom;
        Object.assign(this.frame.style, {
            width: `${Math.floor(width * scale)}px`,
            height: `${Math.floor(height * scale)}px`,
            transform: zoom === 1 ? "" : `translate(${x}px, ${y}px) scale(${zoom})`,
        });
    }

    #draw() {
        const { width, height } = this.painting;
        if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
        const context = this.canvas.getContext("2d");
        const image = context.createImageData(width, height);
        this.painting.draw(new Uint32Array(image.data.buffer));
        context.putImageData(image, 0, 0);
        this.canvas.style.opacity = this.host.view().opacity / 100;
        this.#drawOverlay();
    }

    /** Numbers, the shape being drawn and the brush, in the picture's shape so that nothing is stretched. */
    #drawOverlay() {
        const [width, height] = this.#shape();
        const [sx, sy] = [width / this.painting.width, height / this.painting.height];
        this.overlay.setAttribute("viewBox", `0 0 ${width} ${height}`);
        const parts = [];
        const size = Math.max(width, height) / 20;
        this.painting.phrases.forEach((phrase, i) => {
            const { middle } = this.extents.get(phrase) ?? {};
            if (!middle || !phrase.on || this.#stroke) return;
            parts.push(svg("text", { x: middle[0] * sx, y: middle[1] * sy, "font-size": size }, String(i + 1)));
        });
        const { points = [], tool } = this.#stroke ?? {};
        if (tool === "rectangle" || tool === "lasso") {
            const [[x0, y0], [x1, y1]] = [points[0], points.at(-1)];
            const outline = tool === "lasso" ? points : [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
            parts.push(svg("polygon", { points: outline.map(([x, y]) => `${x * sx},${y * sy}`).join(" ") }));
        }
        if (this.#cursor) {
            const painting = ["brush", "erase"].includes(this.host.view().tool);
            const [cx, cy, r] = [this.#cursor[0] * sx, this.#cursor[1] * sy, painting ? this.host.view().size / 2 : 2];
            parts.push(svg("circle", { cx, cy, r }), svg("circle", { cx, cy, r, class: "ediffi-dark" }));
        }
        this.overlay.replaceChildren(...parts);
    }

    #aim(at) {
        this.#cursor = at;
        this.#frame ||= requestAnimationFrame(() => {
            this.#frame = 0;
            if (this.#stroke) this.#draw();
            else this.#drawOverlay();
        });
    }

    // painting, by pointer or keys

    #at({ clientX, clientY }) {
        const { left, top, width, height } = this.canvas.getBoundingClientRect(); // with all zooming in it
        return [((clientX - left) / width) * this.painting.width, ((clientY - top) / height) * this.painting.height];
    }

    /** Radii of the brush in cells. */
    get #brush() {
        const [width, height] = this.#shape();
        const radius = this.host.view().size / 2;
        return [(radius * this.painting.width) / width, (radius * this.painting.height) / height];
    }

    #press(at, { pointer = null, erase = false, straight = false } = {}) {
        const phrase = this.active;
        if (this.problem) return;
        if (!phrase) return this.#say(this.words.length ? TEXT.choose : TEXT.noPrompt);
        if (!phrase.on) return this.#say(TEXT.hidden(phrase.text));

        const { width, height } = this.painting;
        this.painting.reshape(...this.#shape());
        at = [(at[0] / width) * this.painting.width, (at[1] / height) * this.painting.height];
        const { tool } = this.host.view();
        const pen = this.painting.pen(phrase, erase || tool === "erase");
        if (tool === "fill") {
            this.painting.fill(pen, ...at);
            return this.#commit();
        }
        this.#stroke = { pointer, pen, tool, points: [straight && this.#end ? this.#end : at] };
        this.#drag(at);
    }

    #drag(at) {
        const { pen, tool, points } = this.#stroke;
        if (tool === "brush" || tool === "erase") this.painting.line(pen, points.at(-1), at, ...this.#brush);
        if (tool === "lasso") points.push(at);
        else points[tool === "rectangle" ? 1 : 0] = at;
        this.#aim(at);
    }

    #release() {
        const { pen, tool, points } = this.#stroke;
        this.#stroke = null;
        this.#end = points.at(-1);
        if (tool === "rectangle") this.painting.rectangle(pen, ...points);
        if (tool === "lasso") this.painting.polygon(pen, points);
        this.#commit();
    }

    #pointerDown(event) {
        this.#focus();
        if (event.button === 1) return this.#pan(event);
        if (this.#stroke) return;
        this.frame.setPointerCapture(event.pointerId);
        const erase = event.button === 2 || Boolean(event.buttons & PEN_ERASER);
        this.#press(this.#at(event), { pointer: event.pointerId, erase, straight: event.shiftKey });
    }

    #pointerMove(event) {
        if (event.buttons & 4) return this.#pan(event);
        if (!this.#stroke) return this.#aim(this.#at(event));
        if (event.pointerId !== this.#stroke.pointer) return;
        const moves = event.getCoalescedEvents?.() ?? [];
        for (const move of moves.length ? moves : [event]) this.#drag(this.#at(move));
    }

    #pointerUp(event) {
        if (event.button === 1) return this.#pan(event);
        if (this.#stroke && event.pointerId === this.#stroke.pointer) this.#release();
    }

    /** Drags with the middle button: of the graph, or of the picture in the large editor. */
    #pan(event) {
        if (!this.dialog) return this.host.toGraph(event);
        if (event.type !== "pointermove") return;
        this.#zoom.x += event.movementX;
        this.#zoom.y += event.movementY;
        this.#fit();
    }

    #wheel(event) {
        const away = Math.sign(event.deltaY);
        if (event.altKey) {
            this.#setSize(this.host.view().size - 4 * away);
        } else if (this.dialog && event.ctrlKey) {
            this.#zoomTo(clamp(this.#zoom.scale * 1.25 ** -away, 1, 16), event);
        } else {
            const list = event.target.closest(".ediffi-words, .ediffi-table, .ediffi-menu");
            if (list && list.scrollHeight > list.clientHeight) return event.stopPropagation();
            if (!this.dialog) this.host.toGraph(event);
            return;
        }
        event.preventDefault();
        event.stopPropagation();
    }

    /** Zooms the large editor so that what is under the pointer stays there. */
    #zoomTo(scale, { clientX, clientY }) {
        const { left, top, width, height } = this.stage.getBoundingClientRect();
        const [x, y] = [clientX - left - width / 2, clientY - top - height / 2];
        const by = scale / this.#zoom.scale;
        this.#zoom = scale === 1
            ? { scale, x: 0, y: 0 }
            : { scale, x: x - (x - this.#zoom.x) * by, y: y - (y - this.#zoom.y) * by };
        this.#fit();
    }

    #setSize(size) {
        this.host.view().size = this.size.value = clamp(size, 1, 256);
        this.#drawOverlay();
    }

    #key(event) {
        const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
        const view = this.host.view();
        const { phrases } = this.painting;
        if (event.ctrlKey || event.metaKey) {
            if (key !== "z" && key !== "y") return;
            this.#travel(key === "y" || event.shiftKey ? "redo" : "undo");
        } else if (key in TOOLS) {
            view.tool = TOOLS[key];
            this.refresh();
        } else if (key === "[" || key === "]") {
            this.#setSize(view.size + (key === "]" ? 4 : -4));
        } else if (key === "x") {
            const before = phrases.find(({ id }) => id === view.before);
            if (before) this.#activate(before);
        } else if (phrases[Number(key) - 1] && key !== " ") {
            this.#activate(phrases[Number(key) - 1]);
        } else if (key in ARROWS) {
            const { width, height } = this.painting;
            const [x, y] = this.#cursor ?? [width / 2, height / 2];
            const [rx, ry] = this.#brush.map(radius => Math.max(1, radius));
            const at = [clamp(x + ARROWS[key][0] * rx, 0, width), clamp(y + ARROWS[key][1] * ry, 0, height)];
            if (this.#stroke) this.#drag(at);
            else this.#aim(at);
        } else if (key === " ") {
            if (this.#stroke) this.#release();
            else if (!event.repeat) this.#press(this.#cursor ?? [this.painting.width / 2, this.painting.height / 2]);
        } else {
            return;
        }
        event.preventDefault();
        event.stopPropagation();
    }

    // words and phrases

    #activate(phrase) {
        const view = this.host.view();
        if (this.active && this.active !== phrase) view.before = this.active.id;
        view.phrase = phrase.id;
        this.#note = "";
        this.refresh();
    }

    #mark(first, last) {
        this.#chosen = [first, last];
        const [low, high] = [Math.min(first, last), Math.max(first, last)];
        for (const part of this.strip.children) {
            part.classList.toggle("ediffi-chosen", part.dataset.word >= low && part.dataset.word <= high);
        }
    }

    #dragWords(event) {
        const wordAt = ({ clientX, clientY }) => {
            const part = document.elementFromPoint(clientX, clientY)?.closest("[data-word]");
            return part && this.strip.contains(part) ? Number(part.dataset.word) : null;
        };
        const first = wordAt(event);
        this.#focus();
        if (event.button !== 0 || first === null) return;
        this.strip.setPointerCapture(event.pointerId);
        this.#mark(first, first);
        const listening = new AbortController();
        const on = (type, listener) => this.strip.addEventListener(type, listener, { signal: listening.signal });
        on("pointermove", move => this.#mark(first, wordAt(move) ?? this.#chosen[1]));
        on("pointerup", up => this.#choose(...this.#chosen, up.altKey));
        for (const type of ["pointerup", "pointercancel"]) on(type, () => { listening.abort(); this.#mark(NaN, NaN); });
    }

    #keyWords(event) {
        const [by] = ARROWS[event.key] ?? [0];
        const [first, last] = this.#chosen.map(i => i || 0);
        const next = clamp(last + by, 0, this.words.length - 1);
        if (by) {
            this.#mark(event.shiftKey ? first : next, next);
            const chosen = this.words.slice(Math.min(...this.#chosen), Math.max(...this.#chosen) + 1);
            this.#say(chosen.map(word => word.text).join(" "));
        }
        else if (["Enter", " "].includes(event.key) && this.words.length) this.#choose(first, last, event.altKey);
        else return;
        event.preventDefault();
        this.strip.children[next]?.scrollIntoView({ block: "nearest" });
    }

    /** Makes the words from `first` to `last` a phrase, or turns to the phrase they already are. */
    #choose(first, last, alone) {
        const { start } = this.words[Math.min(first, last)];
        const { end } = this.words[Math.max(first, last)];
        const exactly = alone || first !== last;
        const matches = span => (exactly ? span.start === start && span.end === end : span.start <= start && end <= span.end);
        const known = this.painting.phrases.filter(phrase => spans(this.plain.text, phrase).some(matches));
        known.sort((a, b) => a.text.length - b.text.length);
        if (this.#renaming || !known.length) return this.#define(this.plain.text.slice(start, end), start);
        this.#activate(known[(known.indexOf(this.active) + 1) % known.length]); // again and again: one after the other
    }

    /** A phrase of these words; of the occurrence at `start` only, where another phrase has the same words. */
    #define(words, start) {
        const text = phraseText(words);
        const same = this.painting.phrases.filter(phrase => phrase.text.toLowerCase() === text.toLowerCase());
        const whole = same.find(phrase => phrase.nth === null);
        if (!text || this.problem) return;
        if (whole && !this.#renaming) return this.#activate(whole);
        const place = occurrences(this.plain.text, text).findIndex(span => span.start === start);
        const nth = same.length && place >= 0 ? place + 1 : null;
        const renamed = this.#renaming;
        this.#renaming = null;
        this.#edit(painting => {
            const phrase = renamed ? Object.assign(renamed, { text, nth }) : painting.add(text, nth);
            if (phrase) this.#activate(phrase);
        });
        if (!renamed && this.active?.text !== text) this.#say(TEXT.full);
    }

    // menus

    /** items: [label, action], or null for a line between. */
    #openMenu(items, { left, bottom }) {
        const parts = items.map(item => {
            if (!item) return element("hr");
            const [label, action] = item;
            const made = element("button", { type: "button", textContent: label });
            made.addEventListener("click", () => {
                this.menu.hidePopover();
                this.#focus();
                action();
            });
            return made;
        });
        this.menu.replaceChildren(...parts);
        this.menu.showPopover();
        const { offsetWidth, offsetHeight } = this.menu;
        this.menu.style.left = `${clamp(left, 4, Math.max(4, innerWidth - offsetWidth - 4))}px`;
        this.menu.style.top = `${clamp(bottom + 2, 4, Math.max(4, innerHeight - offsetHeight - 4))}px`;
        parts[0]?.focus();
    }

    #mainMenu() {
        if (this.problem) return [[TEXT.startOver, () => this.#startOver()]];
        const { active, painting } = this;
        const { fit } = this.host.view();
        const forget = () => { delete painting.rest.reference; };
        const ofPhrase = active && [
            [TEXT.fillRest(active.text), () => this.#edit(() => painting.fillRest(active))],
            [TEXT.invert(active.text), () => this.#edit(() => painting.invert(active))],
            null,
            [TEXT.importMask(active.text), async () => this.#importMask(active, await pickPicture())],
            [TEXT.exportMask(active.text), () => this.#save(active)],
            [TEXT.exportMap, () => this.#save()],
            null,
        ];
        return [
            [TEXT.selected, () => this.#paintSelection()],
            ...(ofPhrase ?? []),
            [TEXT.reference, async () => this.#setReference(await pickPicture())],
            ...(painting.rest.reference ? [[TEXT.noReference, () => this.#edit(forget)]] : []),
            [fit === "cover" ? TEXT.fit : TEXT.cover, () => {
                this.host.view().fit = fit === "cover" ? "contain" : "cover";
                this.refresh();
            }],
        ];
    }

    #rowMenu(phrase, index) {
        const others = this.painting.phrases.filter(other => other !== phrase);
        return [
            ...(index > 0 ? [[TEXT.up, () => this.#edit(painting => painting.move(phrase, -1))]] : []),
            ...(index < others.length ? [[TEXT.down, () => this.#edit(painting => painting.move(phrase, 1))]] : []),
            [TEXT.rename, () => { this.#renaming = phrase; this.#showStatus(); }],
            ...others.map(other => [TEXT.copyTo(other.text), () => this.#edit(() => this.painting.copyArea(phrase, other))]),
            null,
            [TEXT.remove, () => this.#edit(painting => painting.remove(phrase))],
        ];
    }

    #paintSelection() {
        const selected = plainText(this.host.selection() ?? "").text;
        if (!phraseText(selected)) return this.#say(TEXT.nothingSelected);
        this.#define(selected, -1);
    }

    // pictures

    #takePicture(event, data) {
        const item = [...(data?.items ?? [])].find(({ kind, type }) => kind === "file" && type.startsWith("image/"));
        if (!item) return;
        event.preventDefault();
        event.stopPropagation(); // or it becomes a node, or a workflow
        const file = item.getAsFile(); // now: it is gone after the event
        if (event.type === "dragover" || this.problem) return;
        const { left = 0, top = 0 } = this.frame.getBoundingClientRect();
        const { active } = this;
        this.#openMenu([
            [TEXT.asReference, () => this.#setReference(file)],
            ...(active ? [[TEXT.asMask(active.text), () => this.#importMask(active, file)]] : []),
        ], { left: event.clientX ?? left, bottom: event.clientY ?? top });
    }

    async #setReference(file) {
        try {
            const reference = await this.host.upload(file);
            this.report = { ...this.report, reference: null };
            this.#edit(painting => { painting.rest.reference = reference; });
        } catch (error) {
            this.#say(error.message);
        }
    }

    async #importMask(phrase, file) {
        this.painting.reshape(...this.#shape());
        try {
            const bright = await brightness(file, this.painting.width, this.painting.height);
            this.#edit(painting => painting.paintWhere(phrase, (_, i) => bright(i)));
        } catch {
            this.#say(TEXT.unreadable);
        }
    }

    /** Saves the area of a phrase in white on black, or the colours of all, cell by cell. */
    #save(phrase) {
        const { width, height, grid } = this.painting;
        const canvas = element("canvas", { width, height });
        const context = canvas.getContext("2d");
        const image = context.createImageData(width, height);
        const pixels = new Uint32Array(image.data.buffer);
        if (phrase) grid.forEach((cell, i) => { pixels[i] = cell & (1 << phrase.bit) ? 0xffffffff : 0xff000000; });
        else this.painting.draw(pixels, false);
        context.putImageData(image, 0, 0);
        if (!phrase) {
            context.globalCompositeOperation = "destination-over"; // black where nothing is painted
            context.fillRect(0, 0, width, height);
        }
        const name = (phrase?.text ?? "colours").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
        element("a", { href: canvas.toDataURL("image/png"), download: `${name}.png` }).click();
    }

    // the large editor

    /** Moves the element into a dialog, and back. */
    #resize() {
        if (this.dialog) return this.dialog.close();
        const place = document.createComment("the painting is in its dialog");
        const home = this.element.parentElement;
        this.element.before(place);
        const attributes = { "aria-label": TEXT.larger };
        this.dialog = element("dialog", { className: "ediffi-dialog", attributes }, this.element);
        document.body.append(this.dialog);
        this.larger.title = TEXT.smaller;
        this.dialog.addEventListener("close", () => {
            if (place.isConnected) place.replaceWith(this.element);
            else home?.append(this.element);
            this.dialog.remove();
            this.dialog = null;
            this.larger.title = TEXT.larger;
            this.#zoom = { scale: 1, x: 0, y: 0 };
            this.#fit();
        });
        this.dialog.showModal();
        this.#focus();
    }
}
