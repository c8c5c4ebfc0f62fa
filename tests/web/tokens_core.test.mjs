import assert from "node:assert/strict";
import test from "node:test";

import { beyond, boxes, countOf, isCut, summary, weightText } from "../../web/tokens_core.js";

const encoder = changes => ({
    name: "CLIP", off: false, count: 0, most: 75, chunks: [], cut: [], cut_count: 0, notes: [], ...changes,
});
const fox = encoder({ count: 3, chunks: [[["a", 1, 1], ["red", 1.2, 1], ["fox", 1, 1]]] });
const long = encoder({
    name: "T5", count: 6, most: 5, cut: [["grass", 1, 2], ["green", 1.5, 1]], cut_count: 9,
    chunks: [[["a", 1, 1], ["🦊", 1, 4]], [["cat", 1, 1]]],
});

test("the summary counts the tokens of each encoder", () => {
    assert.equal(countOf(fox), "3 of 75");
    assert.equal(countOf(encoder({ count: 25, most: null })), "25");
    assert.equal(countOf(long), "6 in 2 chunks of 5, 9 cut");
    assert.equal(countOf(encoder({ off: true })), "off");
    assert.equal(summary([fox, encoder({ name: "T5", off: true })]), "CLIP 3 of 75 · T5 off");
    assert.equal(summary([]), "The tokens of this CLIP cannot be followed.");
});

test("what was cut is a warning, and an encoder that is off is none", () => {
    assert.equal(isCut([fox, encoder({ off: true })]), false);
    assert.equal(isCut([fox, long]), true);
    assert.equal(isCut([]), false);
});

test("weights are short and the usual one is none", () => {
    assert.equal(weightText(1), "");
    assert.equal(weightText(1.1000000000000001), "×1.1");
    assert.equal(weightText(1.21), "×1.21");
    assert.equal(weightText(0), "×0");
    assert.equal(weightText(-0.5), "×-0.5");
});

test("neighbouring boxes differ in tint, across chunks as well", () => {
    const lists = boxes(long);
    assert.deepEqual(lists.map(list => list.length), [2, 1, 2]);
    const tints = lists.flat().map(box => box.tint);
    tints.slice(1).forEach((tint, i) => assert.notEqual(tint, tints[i]));
});

test("a box says which tokens stand for its piece", () => {
    const [[a, red], none] = boxes(fox);
    assert.deepEqual(a, { text: "a", weight: "", tint: 0, cut: false, title: "CLIP: token 1" });
    assert.deepEqual(red, { text: "red", weight: "×1.2", tint: 1, cut: false, title: "CLIP: token 2, weight 1.2" });
    assert.deepEqual(none, []);
    const [[, face], [cat], [grass, green]] = boxes(long);
    assert.equal(face.title, "T5: 4 tokens, 2 to 5, chunk 1");
    assert.equal(cat.title, "T5: token 6, chunk 2");
    assert.deepEqual(grass, { text: "grass", weight: "", tint: 1, cut: true, title: "T5: 2 tokens, not read" });
    assert.equal(green.title, "T5: 1 token, not read");
    assert.equal(green.weight, "");
});

test("tokens without a box are counted", () => {
    assert.deepEqual(beyond(fox), { read: 0, cut: 0 });
    assert.deepEqual(beyond(long), { read: 0, cut: 6 });
    assert.deepEqual(beyond({ ...fox, count: 1000 }), { read: 997, cut: 0 });
});
