import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import {
    decodeRuns, encodeRuns, gridSize, History, inkOn, isPaintingValue, MAX_PHRASES, occurrences, Painting, PALETTE,
    phraseText, plainText, spans, words,
} from "../../web/painter_core.js";

const GOLDEN = new URL("painting.json", import.meta.url); // read by tests/core/test_painting.py as well

/** Numbers in [0, 1) that are the same in each run. */
function randomNumbers(seed) {
    return () => {
        seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
        return seed / 2 ** 32;
    };
}

function painted(width, height, ...texts) {
    const painting = new Painting(width, height);
    return [painting, ...texts.map(text => painting.add(text))];
}

function cells(painting, phrase) {
    return painting.grid.reduce((count, cell) => count + ((cell >>> phrase.bit) & 1), 0);
}

function reloaded(painting) {
    return Painting.parse(String(painting));
}

test("the stored form is the one that Python reads", () => {
    const [painting, red, blue, off] = painted(64, 48, "red circle", "blue square", "grass");
    painting.rectangle(painting.pen(red), [8, 6], [24, 30]);
    painting.overlap = true;
    painting.rectangle(painting.pen(blue), [16, 24], [60, 44]);
    Object.assign(blue, { nth: 2, strength: 0.5 });
    off.on = false;
    assert.equal(String(painting), readFileSync(GOLDEN, "utf8").trim());
    assert.equal(String(reloaded(painting)), String(painting));
});

test("any painting survives its text form, all 32 bits of it", () => {
    for (let seed = 0; seed < 60; seed++) {
        const random = randomNumbers(seed);
        const [width, height] = [16 + Math.floor(random() * 60), 16 + Math.floor(random() * 60)];
        const count = seed % 3 ? 1 + Math.floor(random() * 6) : MAX_PHRASES;
        const [painting, ...phrases] = painted(width, height, ...Array(count).fill("word"));
        painting.overlap = random() < 0.5;
        for (const phrase of phrases) {
            const pen = painting.pen(phrase, random() < 0.2);
            painting.dab(pen, random() * width, random() * height, random() * 20, random() * 20);
            pen(Math.floor(random() * painting.grid.length));
        }
        assert.deepEqual(reloaded(painting).grid, painting.grid);
        assert.equal(String(reloaded(painting)), String(painting));
    }
});

test("runs that do not cover the grid are refused", () => {
    const runs = (...bytes) => btoa(String.fromCharCode(...bytes));
    const grid = new Uint32Array(256);
    assert.equal(encodeRuns(grid, 0), runs(0x80, 2));
    const damaged = [runs(0x80, 4), runs(255, 1), runs(0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1), "", "*", undefined];
    for (const rle of damaged) assert.throws(() => decodeRuns(rle, grid, 0));
});

test("a painting of a newer pack, or a damaged one, says so", () => {
    const value = changes => JSON.stringify({ v: 1, w: 16, h: 16, mode: "exclusive", phrases: [], ...changes });
    assert.throws(() => Painting.parse(value({ v: 2 })), /newer version .* \(format 2\)/);
    for (const changes of [{ v: "1" }, { w: 15 }, { h: 1025 }, { w: 20.5 }, { phrases: {} }, { v: undefined }]) {
        assert.throws(() => Painting.parse(value(changes)), /damaged/);
    }
    const phrase = { id: "a", text: "a cat", color: "#000000", rle: btoa("\x01") };
    assert.throws(() => Painting.parse(value({ phrases: [phrase] })), /area of "a cat" is damaged/);
    assert.throws(() => Painting.parse(value({ phrases: [{ ...phrase, color: "red" }] })), /Phrase 1 is damaged/);
    assert.throws(() => Painting.parse(value({ phrases: Array(33).fill(phrase) })), /33 phrases/);
});

test("keys of other versions are kept, and the order of all", () => {
    const phrase = { id: "a", weight: 3, text: "cat", nth: null, color: "#000000", strength: 1, on: true, soft: [1], rle: "gAI=" };
    const value = JSON.stringify({ v: 1, w: 16, h: 16, mode: "overlap", phrases: [phrase], reference: { name: "x" }, grain: 2 });
    assert.equal(String(Painting.parse(value)), value);
});

test("nothing is stored as long as there is nothing", () => {
    const [painting, cat] = painted(16, 16, "cat");
    assert.notEqual(String(painting), "");
    painting.remove(cat);
    assert.equal(String(painting), "");
    assert.ok(["", '{"v": 3}', ' {"v"'].every(isPaintingValue));
    assert.ok(![512, null, undefined, "fixed", "[]", {}].some(isPaintingValue));
});

test("the encoders' text has no weights, and knows where each character stood", () => {
    const prompt = "a ((red  hat:1.2)) \\(x\\), (b:-.5) 3:1";
    const { text, at } = plainText(prompt);
    assert.equal(text, "a red hat (x), b 3:1");
    [...text].forEach((character, i) => assert.match(prompt.slice(at[i], at[i] + 2), character === " " ? /^\s/ : new RegExp(`^\\\\?[${character}]`)));
    assert.equal(plainText("").text, "");
});

test("words of several scripts", () => {
    const texts = text => words(text).map(word => word.text);
    assert.deepEqual(texts("un café, t-shirt embedding:foo.pt a|b (c)"), ["un", "café", "t-shirt", "a", "b", "c"]);
    assert.deepEqual(texts("一只猫 on 草"), ["一", "只", "猫", "on", "草"]);
    for (const { start, end, text } of words("a red 🐈 hat")) assert.equal("a red 🐈 hat".slice(start, end), text);
});

test("a phrase is found as whole words, in any capitals, with any quotation marks", () => {
    const starts = (text, phrase) => occurrences(text, phrase).map(({ start }) => start);
    assert.deepEqual(starts("a Cat, concatenate, cat_2 cat", "cat"), [2, 20, 26]);
    assert.deepEqual(starts("a “red”  hat – x", 'a "red" hat -'), [0]);
    assert.deepEqual(starts("画一只猫在草地", "猫"), [3]);
    assert.deepEqual(starts("a.b axb (c*)", "a.b"), [0]);
    assert.deepEqual(starts("a.b axb (c*)", "c*"), [9]);
    assert.deepEqual(starts("x", " "), []);
    const text = "red cat, red dog";
    assert.equal(spans(text, { text: "red", nth: null }).length, 2);
    assert.deepEqual(spans(text, { text: "red", nth: 2 }), [{ start: 9, end: 12 }]);
    assert.deepEqual(spans(text, { text: "red", nth: 3 }), []);
    assert.equal(phraseText("  red \n hat "), "red hat");
});

test("exclusive painting takes from the visible, overlap leaves all", () => {
    const [painting, a, b, hidden] = painted(16, 16, "a", "b", "hidden");
    for (const phrase of [a, hidden]) {
        painting.overlap = true;
        painting.paintWhere(phrase, () => true);
    }
    hidden.on = false;
    painting.paintWhere(b, (_, i) => i < 10);
    assert.deepEqual([a, b, hidden].map(phrase => cells(painting, phrase)), [256, 10, 256]);
    painting.overlap = false;
    painting.paintWhere(b, (_, i) => i < 20);
    assert.deepEqual([a, b, hidden].map(phrase => cells(painting, phrase)), [236, 20, 256]);
});

test("a dab is round and a thin line has no gaps", () => {
    const [painting, a] = painted(200, 200, "a");
    painting.dab(painting.pen(a), 100, 100, 50, 50);
    assert.ok(Math.abs(cells(painting, a) / (Math.PI * 50 ** 2) - 1) < 0.01);
    painting.clear(a);
    painting.dab(painting.pen(a), 100, 100, 80, 20);
    assert.ok(Math.abs(cells(painting, a) / (Math.PI * 80 * 20) - 1) < 0.01);
    painting.clear(a);
    painting.line(painting.pen(a), [-20, 10.2], [230, 180.7], 0.5, 0.5);
    const rows = new Set([...painting.grid.keys()].filter(i => painting.grid[i]).map(i => Math.floor(i / 200)));
    const columns = new Set([...painting.grid.keys()].filter(i => painting.grid[i]).map(i => i % 200));
    assert.equal(columns.size, 200);
    assert.ok(rows.size > 130);
});

test("a lasso takes the inside, also of what leaves the picture", () => {
    const [painting, a] = painted(100, 100, "a");
    painting.polygon(painting.pen(a), [[0, 0], [100, 0], [0, 100]]);
    assert.ok(Math.abs(cells(painting, a) - 5000) <= 50);
    painting.clear(a);
    painting.polygon(painting.pen(a), [[50, 50], [500, 50], [500, -400], [50, -400]]);
    assert.equal(cells(painting, a), 2500);
    painting.clear(a);
    painting.rectangle(painting.pen(a), [30, 40], [10, 20]);
    assert.equal(cells(painting, a), 400);
});

test("a fill stops at other colours, and the rest is what nobody has", () => {
    const [painting, a, b] = painted(60, 40, "a", "b");
    painting.rectangle(painting.pen(a), [20, 0], [25, 40]);
    painting.fill(painting.pen(b), 3, 3);
    assert.deepEqual([cells(painting, a), cells(painting, b)], [200, 800]);
    assert.equal(painting.unpainted, 1400 / 2400);
    painting.fillRest(b);
    assert.equal(cells(painting, b), 2200);
    painting.invert(a);
    assert.deepEqual([cells(painting, a), cells(painting, b)], [2200, 0]);
    painting.copyArea(a, b);
    assert.deepEqual([cells(painting, a), cells(painting, b), painting.overlap], [2200, 2200, true]);
});

test("a painted grid is never resampled, an empty one takes the picture's shape", () => {
    const [painting, a] = painted(16, 16, "a");
    painting.reshape(32, 24);
    assert.deepEqual([painting.width, painting.height, painting.grid.length], [32, 24, 768]);
    painting.pen(a)(0);
    painting.reshape(64, 64);
    assert.equal(painting.width, 32);
    assert.deepEqual(gridSize(1536, 1024, 512), [512, 341]);
    assert.deepEqual(gridSize(64, 8192, 512), [16, 512]);
});

test("phrases get ids, colours and bits of their own, 32 of them", () => {
    const [painting, ...phrases] = painted(16, 16, ...Array(32).fill("word"));
    for (const key of ["id", "color", "bit"]) assert.equal(new Set(phrases.map(phrase => phrase[key])).size, 32);
    assert.equal(painting.add("one more"), null);
    assert.equal(new Set(PALETTE).size, 32);
    painting.remove(phrases[3]);
    painting.move(phrases[4], -2);
    assert.equal(painting.phrases.indexOf(phrases[4]), 1);
    assert.equal(painting.add("another").bit, phrases[3].bit);
});

test("labels stand inside their areas", () => {
    const [painting, a] = painted(80, 60, "a");
    assert.deepEqual(painting.extent(a), { coverage: 0, middle: null });
    painting.dab(painting.pen(a), 20, 20, 10, 10);
    painting.dab(painting.pen(a), 60, 40, 15, 15);
    const [x, y] = painting.extent(a).middle;
    assert.ok(Math.hypot(x - 60, y - 40) < 2);
});

test("overlapping phrases show as stripes, hidden ones not at all", () => {
    const [painting, a, b] = painted(16, 16, "a", "b");
    Object.assign(a, { color: "#ff0000" });
    Object.assign(b, { color: "#0000ff" });
    painting.overlap = true;
    for (const phrase of [a, b]) painting.paintWhere(phrase, () => true);
    const pixels = new Uint32Array(256);
    const [red, blue] = [0xff0000ff, 0xffff0000]; // ABGR
    painting.draw(pixels);
    assert.deepEqual(new Set(pixels), new Set([red, blue]));
    painting.draw(pixels, false);
    assert.deepEqual(new Set(pixels), new Set([blue]));
    b.on = false;
    painting.draw(pixels);
    assert.deepEqual(new Set(pixels), new Set([red]));
    assert.deepEqual([inkOn("#ffff00"), inkOn("#000080")], ["#000000", "#ffffff"]);
});

test("undo and redo step through the values, and a new step forgets what was undone", () => {
    const history = new History(3);
    let value = "0";
    const change = next => { history.record(value); value = next; };
    const go = direction => { value = history[direction](value) ?? value; return value; };
    change("1");
    change("2");
    assert.deepEqual([go("undo"), go("undo"), go("undo"), go("redo"), go("redo"), go("redo")], ["1", "0", "0", "1", "2", "2"]);
    go("undo");
    change("3");
    assert.equal(go("redo"), "3");
    change("4"); change("5"); change("6");
    assert.deepEqual([go("undo"), go("undo"), go("undo"), go("undo")], ["5", "4", "3", "3"]);
});
