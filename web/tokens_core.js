/**
 * What the picture of the tokens says, as data. Knows neither ComfyUI nor the page.
 *
 * @typedef {[string, number, number]} Piece  of the prompt; its weight; how many tokens stand for it
 * @typedef {object} Encoder  as nodes/bridge_tokens.py tells it
 * @property {string} name
 * @property {boolean} off  it was given an empty prompt
 * @property {number} count  tokens of the prompt that it reads
 * @property {number | null} most  that a chunk can hold
 * @property {Piece[][]} chunks  the first of these tokens
 * @property {Piece[]} cut  the first of those that it does not read
 * @property {number} cut_count  of all of those
 * @property {string[]} notes  sentences about them
 */

const UNKNOWN = "The tokens of this CLIP cannot be followed.";

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** @param {Encoder} encoder */
export function countOf({ off, count, most, chunks, cut_count: cut }) {
    if (off) return "off";
    const room = most == null ? "" : chunks.length > 1 ? ` in ${chunks.length} chunks of ${most}` : ` of ${most}`;
    return `${count}${room}${cut ? `, ${cut} cut` : ""}`;
}

/** @param {Encoder[]} encoders */
export function summary(encoders) {
    return encoders.map(encoder => `${encoder.name} ${countOf(encoder)}`).join(" · ") || UNKNOWN;
}

/** @param {Encoder[]} encoders */
export const isCut = encoders => encoders.some(encoder => encoder.cut_count > 0);

/** @param {number} weight as ComfyUI has it, to three digits */
export const weightText = weight => (weight === 1 ? "" : `×${Number(weight.toPrecision(3))}`);

/**
 * The boxes of an encoder, chunk by chunk: neighbours differ in `tint`, which goes on from chunk to chunk. The last list is of
 * what was cut, empty if nothing was.
 *
 * @param {Encoder} encoder
 * @returns {{text: string, weight: string, tint: 0 | 1, cut: boolean, title: string}[][]}
 */
export function boxes({ name, chunks, cut }) {
    let place = 0; // tokens before
    let tint = 1;
    const box = (isCut, chunk) => ([text, weight, tokens]) => {
        tint = 1 - tint;
        const numbers = tokens > 1 ? `${plural(tokens, "token")}, ${place + 1} to ${place + tokens}` : `token ${place + 1}`;
        place += tokens;
        const facts = isCut ? [plural(tokens, "token"), "not read"] : [numbers];
        if (weight !== 1 && !isCut) facts.push(`weight ${weightText(weight).slice(1)}`);
        if (chunk) facts.push(`chunk ${chunk}`);
        return { text, weight: isCut ? "" : weightText(weight), tint, cut: isCut, title: `${name}: ${facts.join(", ")}` };
    };
    return [...chunks.map((pieces, i) => pieces.map(box(false, chunks.length > 1 ? i + 1 : 0))), cut.map(box(true, 0))];
}

/** How many tokens are read, or cut, beyond those that have a box. @param {Encoder} encoder */
export function beyond({ count, chunks, cut, cut_count: allCut }) {
    const shown = pieces => pieces.reduce((sum, [, , tokens]) => sum + tokens, 0);
    return { read: Math.max(0, count - shown(chunks.flat())), cut: Math.max(0, allCut - shown(cut)) };
}
