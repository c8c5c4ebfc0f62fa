/**
 * Painting with words, without a browser: the grid, its text form, words and phrases, tools, undo.
 *
 * The picture is a grid of cells, and each cell holds 32 bits, one for each phrase that may lie there. Coordinates are
 * in cells, and may be fractions. `ediffi_core/painting.py` reads the same text form.
 */

export const VERSION = 1;
export const MAX_PHRASES = 32;
const MAX_CHARACTERS = 1000; // of one phrase
const MIN_SIDE = 16;
const MAX_SIDE = 1024;

// Okabe and Ito, then Tol's muted colours: told apart by most colour-blind eyes. Then all of them again, darker.
const BRIGHT = [
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999933",
    "#882255", "#44aa99", "#ddcc77", "#aa4499", "#117733", "#cc6677", "#332288", "#dddddd",
];
export const PALETTE = [...BRIGHT, ...BRIGHT.map(color => hex(channels(color).map(c => Math.round(c * 0.55))))];

export function channels(color) {
    return [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16));
}

function hex(rgb) {
    return "#" + rgb.map(c => c.toString(16).padStart(2, "0")).join("");
}

/** Black or white, whichever reads better on the colour. */
export function inkOn(color) {
    const [r, g, b] = channels(color).map(c => (c / 255) ** 2.2);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000000" : "#ffffff";
}

/** [width, height] of a grid in the shape of a picture, `side` cells on its longer side. */
export function gridSize(width, height, side) {
    const scale = side / Math.max(width, height);
    return [width, height].map(length => clamp(Math.round(length * scale), MIN_SIDE, MAX_SIDE));
}

export function clamp(value, low, high) {
    return Math.min(high, Math.max(low, value));
}

// words and phrases

/**
 * The prompt as the encoders read it: `(red hat:1.2)` loses brackets and weight, `\(` is a bracket, spaces are single.
 * `at[i]` is where its character i stands in the prompt.
 */
export function plainText(prompt) {
    let text = "";
    const at = [];
    const parts = /\\(?<bracket>[()])|:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*(?=\))|[()]|(?<space>\s+)|(?<other>[^])/g;
    for (const { index, groups } of prompt.matchAll(parts)) {
        const character = groups.other ?? groups.bracket ?? (groups.space && text && !text.endsWith(" ") ? " " : "");
        if (!character) continue;
        text += character;
        at.push(index);
    }
    return { text, at };
}

// Scripts in which a word is written against its neighbours.
const SCRIPTS = ["Hani", "Hira", "Kana", "Bopo", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"];
const UNSPACED = SCRIPTS.map(script => `\\p{sc=${script}}`).join("");
const IN_WORD = `(?![${UNSPACED}\\p{sc=Hang}])[\\p{L}\\p{N}\\p{M}]`;
const WORD = new RegExp(`embedding:\\S+|[${UNSPACED}]\\p{M}*|[^\\s,.;:!?()[\\]{}|"“”${UNSPACED}]+`, "gu");

/** The words of a plain text, [{start, end, text}]; single characters in scripts that put no spaces between words. */
export function words(text) {
    return [...text.matchAll(WORD)]
        .filter(([word]) => !word.startsWith("embedding:"))
        .map(({ 0: word, index }) => ({ start: index, end: index + word.length, text: word }));
}

/**
 * Where a phrase stands in a plain text, [{start, end}], from left to right: whole words, capitals or not, quotation marks
 * and dashes of any kind. The run decides in the end, by `occurrences` in `ediffi_core/phrases.py`.
 */
export function occurrences(text, phrase) {
    const wanted = untypeset(phrase.trim());
    const pattern = wanted.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&").replace(/\s+/g, "\\s+");
    if (!pattern) return [];
    const edge = new RegExp(`^${IN_WORD}`, "u");
    const before = edge.test(wanted) ? `(?<!${IN_WORD})` : "";
    const after = edge.test([...wanted].at(-1)) ? `(?!${IN_WORD})` : "";
    const found = untypeset(text).matchAll(new RegExp(before + pattern + after, "giu"));
    return [...found].map(({ 0: { length }, index }) => ({ start: index, end: index + length }));
}

function untypeset(text) {
    return text.replace(/[`´ʼ‘’‚‛′‹›]/g, "'").replace(/[«»“”„‟″]/g, '"').replace(/[‐-―−﹘]/g, "-");
}

/** The occurrences a phrase stands for: all, or its nth. */
export function spans(text, phrase) {
    const all = occurrences(text, phrase.text);
    return phrase.nth === null ? all : all.slice(phrase.nth - 1, phrase.nth);
}

/** A phrase as it is stored: trimmed, single spaces, not too long. */
export function phraseText(text) {
    return text.trim().replace(/\s+/g, " ").slice(0, MAX_CHARACTERS);
}

// the text form of one phrase's cells

/** Lengths of alternating runs, unpainted first, row by row; as unsigned LEB128 in base64. */
export function encodeRuns(grid, bit) {
    const bytes = [];
    const put = length => {
        for (; length > 127; length >>>= 7) bytes.push((length & 127) | 128);
        bytes.push(length);
    };
    let painted = 0;
    let start = 0;
    for (let i = 0; i < grid.length; i++) {
        if (((grid[i] >>> bit) & 1) === painted) continue;
        put(i - start);
        start = i;
        painted ^= 1;
    }
    put(grid.length - start);

    let binary = "";
    for (const byte of bytes) binary += String.fromCharCode(byte);
    return btoa(binary);
}

/** Sets `bit` in the cells that `rle` names. Throws when its runs do not cover the grid exactly. */
export function decodeRuns(rle, grid, bit) {
    const bytes = Uint8Array.from(atob(rle), character => character.charCodeAt(0));
    let position = 0;
    let painted = false;
    for (let i = 0; i < bytes.length; painted = !painted) {
        let length = 0;
        let scale = 1;
        do {
            length += (bytes[i] & 127) * scale;
            scale *= 128;
        } while (bytes[i++] & 128 && i < bytes.length);
        if (length > grid.length - position) throw new Error("too long");
        if (painted) for (let end = position + length, j = position; j < end; j++) grid[j] |= 1 << bit;
        position += length;
    }
    if (position !== grid.length) throw new Error("too short");
}

/** Whether a widget's value may be a painting at all, whole or damaged. */
export function isPaintingValue(value) {
    return value === "" || (typeof value === "string" && value.trimStart().startsWith("{"));
}

/**
 * A grid and its phrases. A phrase is {id, text, nth, color, strength, on, bit}; `bit` is its place in the cells and is
 * not stored. Keys of a stored painting that we do not know are kept.
 */
export class Painting {
    constructor(width, height) {
        this.width = width;
        this.height = height;
        this.grid = new Uint32Array(width * height);
        this.overlap = false; // whether painting leaves other phrases where they are
        this.phrases = [];
        this.rest = {}; // reference, and keys we do not know
    }

    /** From the widget's value. Throws an Error in the user's words. */
    static parse(value) {
        const stored = JSON.parse(value);
        const { v, w, h, mode, phrases, ...rest } = stored;
        if (v > VERSION) {
            throw new Error(`It was made by a newer version of this pack (format ${v}). Update the pack to edit it.`);
        }
        const isSide = side => Number.isInteger(side) && side >= MIN_SIDE && side <= MAX_SIDE;
        if (v !== VERSION || !isSide(w) || !isSide(h) || !Array.isArray(phrases)) throw new Error("It is damaged.");
        if (phrases.length > MAX_PHRASES) throw new Error(`It has ${phrases.length} phrases, and may have ${MAX_PHRASES}.`);

        const painting = new Painting(w, h);
        painting.overlap = mode === "overlap";
        painting.rest = rest;
        painting.phrases = phrases.map(({ rle, ...phrase }, bit) => {
            if (typeof phrase.text !== "string" || !/^#[0-9a-f]{6}$/i.test(phrase.color)) {
                throw new Error(`Phrase ${bit + 1} is damaged.`);
            }
            try {
                decodeRuns(rle, painting.grid, bit);
            } catch {
                throw new Error(`The area of "${phrase.text}" is damaged.`);
            }
            const { nth = null, strength = 1, on = true } = phrase;
            return { ...phrase, nth, strength, on, bit }; // in the order they came in
        });
        return painting;
    }

    /** The widget's value: "" as long as there is nothing to store. */
    toString() {
        if (!this.phrases.length && !this.overlap && !Object.keys(this.rest).length) return "";
        const phrases = this.phrases.map(({ bit, ...phrase }) => ({ ...phrase, rle: encodeRuns(this.grid, bit) }));
        const mode = this.overlap ? "overlap" : "exclusive";
        return JSON.stringify({ v: VERSION, w: this.width, h: this.height, mode, phrases, ...this.rest });
    }

    /** Adds a phrase with the next free colour; null where there is no room for one more. */
    add(text, nth = null) {
        if (this.phrases.length >= MAX_PHRASES) return null;
        const free = (of, candidate) => !this.phrases.some(phrase => phrase[of] === candidate);
        const count = [...Array(MAX_PHRASES).keys()];
        const id = count.map(n => `p${n + 1}`).find(id => free("id", id));
        const color = PALETTE.find(color => free("color", color)) ?? PALETTE[0];
        const phrase = { id, text, nth, color, strength: 1, on: true, bit: count.find(bit => free("bit", bit)) };
        this.phrases.push(phrase);
        return phrase;
    }

    remove(phrase) {
        this.clear(phrase);
        this.phrases.splice(this.phrases.indexOf(phrase), 1);
    }

    /** Moves a phrase up (-1) or down (1) in the order. */
    move(phrase, by) {
        const from = this.phrases.indexOf(phrase);
        this.phrases.splice(from, 1);
        this.phrases.splice(clamp(from + by, 0, this.phrases.length), 0, phrase);
    }

    /** Takes another grid as long as nothing is painted; a painted one is never resampled. */
    reshape(width, height) {
        if ((width === this.width && height === this.height) || this.grid.some(Boolean)) return;
        [this.width, this.height, this.grid] = [width, height, new Uint32Array(width * height)];
    }

    /** The bits of all phrases that are switched on. */
    get visible() {
        return this.phrases.reduce((bits, phrase) => (phrase.on ? bits | (1 << phrase.bit) : bits), 0);
    }

    /** A function that paints (or erases) one cell. What is switched off stays as it is. */
    pen(phrase, erase = false) {
        const { grid } = this;
        const bit = 1 << phrase.bit;
        if (erase) return i => { grid[i] &= ~bit; };
        const kept = this.overlap ? -1 : ~this.visible;
        return i => { grid[i] = (grid[i] & kept) | bit; };
    }

    /** An ellipse, so that strokes are round on a screen that stretches the grid. */
    dab(pen, x, y, rx, ry) {
        const [top, bottom] = [Math.max(0, Math.ceil(y - ry - 0.5)), Math.min(this.height - 1, Math.floor(y + ry - 0.5))];
        for (let row = top; row <= bottom; row++) {
            const half = rx * Math.sqrt(Math.max(0, 1 - ((row + 0.5 - y) / ry) ** 2));
            this.#row(pen, row, x - half, x + half);
        }
        if (rx < 1 || ry < 1) this.#cell(pen, x, y); // a fine brush may fall between the centres
    }

    line(pen, [x0, y0], [x1, y1], rx, ry) {
        const steps = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0) / Math.max(0.5, Math.min(rx, ry) / 4)));
        for (let k = 0; k <= steps; k++) {
            this.dab(pen, x0 + ((x1 - x0) * k) / steps, y0 + ((y1 - y0) * k) / steps, rx, ry);
        }
    }

    /** The inside of a closed line through `points`, by the even-odd rule. */
    polygon(pen, points) {
        for (let row = 0; row < this.height; row++) {
            const y = row + 0.5;
            const crossings = [];
            points.forEach(([x1, y1], i) => {
                const [x0, y0] = points.at(i - 1);
                if (y0 <= y !== y1 <= y) crossings.push(x0 + ((y - y0) / (y1 - y0)) * (x1 - x0));
            });
            crossings.sort((a, b) => a - b);
            for (let i = 0; i < crossings.length; i += 2) this.#row(pen, row, crossings[i], crossings[i + 1]);
        }
    }

    rectangle(pen, [x0, y0], [x1, y1]) {
        this.polygon(pen, [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]);
    }

    /** Paints the connected cells that look the same as the one at (x, y). */
    fill(pen, x, y) {
        const { width, height, grid, visible } = this;
        const start = clamp(Math.floor(y), 0, height - 1) * width + clamp(Math.floor(x), 0, width - 1);
        const look = grid[start] & visible;
        const seen = new Uint8Array(grid.length);
        const stack = [start];
        seen[start] = 1;
        const visit = i => {
            if (seen[i] || (grid[i] & visible) !== look) return;
            seen[i] = 1;
            stack.push(i);
        };
        while (stack.length) {
            const i = stack.pop();
            const column = i % width;
            if (column > 0) visit(i - 1);
            if (column < width - 1) visit(i + 1);
            if (i >= width) visit(i - width);
            if (i < grid.length - width) visit(i + width);
        }
        seen.forEach((yes, i) => yes && pen(i));
    }

    /** Gives the phrase all cells that `chosen(cell, index)` says. */
    paintWhere(phrase, chosen) {
        const pen = this.pen(phrase);
        this.grid.forEach((cell, i) => chosen(cell, i) && pen(i));
    }

    fillRest(phrase) {
        const { visible } = this;
        this.paintWhere(phrase, cell => !(cell & visible));
    }

    invert(phrase) {
        const bit = 1 << phrase.bit;
        const [pen, eraser] = [this.pen(phrase), this.pen(phrase, true)];
        this.grid.forEach((cell, i) => (cell & bit ? eraser(i) : pen(i)));
    }

    /** Gives `to` the cells of `from` as well, which is an overlap. */
    copyArea(from, to) {
        this.overlap = true;
        this.paintWhere(to, cell => cell & (1 << from.bit));
    }

    clear(phrase) {
        this.grid.forEach((_, i) => { this.grid[i] &= ~(1 << phrase.bit); });
    }

    /** The phrase's part of the picture, and the middle of its widest run (null without one), for a label. */
    extent(phrase) {
        const { grid, width } = this;
        const bit = 1 << phrase.bit;
        let [cells, run, longest, widest] = [0, 0, 0, []];
        for (let i = 0; i < grid.length; i++) {
            if (!(grid[i] & bit)) {
                run = 0;
                continue;
            }
            cells++;
            run = i % width ? run + 1 : 1;
            if (run < longest) continue;
            if (run > longest) [longest, widest] = [run, []];
            widest.push(i); // ends of the runs of this length
        }
        if (!cells) return { coverage: 0, middle: null };
        const end = widest[widest.length >> 1];
        const middle = [(end % width) + 1 - longest / 2, Math.floor(end / width) + 0.5];
        return { coverage: cells / grid.length, middle };
    }

    /** The part of the picture that no visible phrase has. */
    get unpainted() {
        const { visible } = this;
        return this.grid.reduce((count, cell) => count + !(cell & visible), 0) / this.grid.length;
    }

    /**
     * Colours of all cells into `pixels`, a Uint32Array over ImageData's bytes. Where phrases overlap they show as stripes,
     * or the last one does.
     */
    draw(pixels, striped = true) {
        const colors = this.phrases
            .filter(phrase => phrase.on)
            .map(({ bit, color }) => {
                const [r, g, b] = channels(color);
                return [1 << bit, (0xff000000 | (b << 16) | (g << 8) | r) >>> 0]; // ABGR: little-endian RGBA
            });
        const looks = new Map([[0, [0]]]);
        const { grid, width } = this;
        for (let i = 0; i < grid.length; i++) {
            let look = looks.get(grid[i]);
            if (!look) {
                look = colors.filter(([bit]) => grid[i] & bit).map(([, color]) => color);
                if (!look.length) look = [0];
                if (!striped) look = look.slice(-1);
                looks.set(grid[i], look);
            }
            pixels[i] = look.length === 1 ? look[0] : look[(((i % width) + Math.floor(i / width)) >> 2) % look.length];
        }
    }

    #cell(pen, x, y) {
        const [column, row] = [Math.floor(x), Math.floor(y)];
        if (column >= 0 && row >= 0 && column < this.width && row < this.height) pen(row * this.width + column);
    }

    /** The cells of a row whose centres lie from `left` to `right`. */
    #row(pen, row, left, right) {
        const [first, last] = [Math.max(0, Math.ceil(left - 0.5)), Math.min(this.width - 1, Math.floor(right - 0.5))];
        for (let column = first; column <= last; column++) pen(row * this.width + column);
    }
}

/** Values before and after the present one. */
export class History {
    constructor(limit = 50) {
        this.limit = limit;
        this.past = [];
        this.future = [];
    }

    /** Call with the value that a change has replaced. */
    record(value) {
        this.past = [...this.past, value].slice(-this.limit);
        this.future = [];
    }

    /** The value before `present`, or undefined. */
    undo(present) {
        return this.#step(this.past, this.future, present);
    }

    redo(present) {
        return this.#step(this.future, this.past, present);
    }

    #step(from, to, present) {
        if (from.length) to.push(present);
        return from.pop();
    }
}
