// Markdown within a block, to nodes: emphasis, code, links, formulas. See markdown.js for why it is safe.

import { element } from "./dom.js";
import { formula } from "./formula.js";

const DEEPEST = 12; // of emphasis within each other; deeper ones stay text
const SAFE_LINK = /^(https?:\/\/|mailto:)/i;

const SPAN = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const LINK = /!?\[([^[\]\n]{0,999})\]\(\s{0,9}<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,999}\)[^\s()<>]{0,999}){0,9})>?(?:\s{1,9}"[^"\n]{0,999}")?\s{0,9}\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`]{1,2000}/y;

/** The nodes of `text`. */
export function inline(text, depth = 0) {
  const out = document.createDocumentFragment();
  const hopeless = new Set(); // marks without a partner further on: each is searched for once, not at each place
  let plain = "";
  let at = 0;
  const put = (node, next) => {
    if (plain) out.append(plain);
    plain = "";
    out.append(node);
    at = next;
  };
  while (at < text.length) {
    const c = text[at];
    const math = c === "\\" || c === "$" ? mathematical(text, at, hopeless) : null;
    if (math) {
      put(...math);
      continue;
    }
    if (c === "\\" && !"()[]".includes(text[at + 1]) && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    const found =
      c === "`" ? code(text, at, hopeless)
      : c === "[" || c === "!" ? link(text, at)
      : c === "h" ? address(text, at)
      : c === "*" || c === "_" || c === "~" ? span(text, at, depth, hopeless)
      : c === "\n" ? [element("br"), at + 1]
      : null;
    if (found) put(...found);
    else {
      // A run of marks that means nothing is passed over as a whole.
      const run = /[`*_~]/.test(c) ? runLength(text, at) : 1;
      plain += text.slice(at, at + run);
      at += run;
    }
  }
  if (plain) out.append(plain);
  return out;
}

const MATH = { "\\(": "\\)", "\\[": "\\]", $$: "$$", $: "$" };

/** A formula within text. Single dollars are also money: they count only where no white space or digit says so. */
function mathematical(text, at, hopeless) {
  const two = text.slice(at, at + 2);
  const mark = two in MATH ? two : text[at];
  if (!(mark in MATH) || hopeless.has(mark)) return null;
  const begin = at + mark.length;
  if (mark === "$" && (/\s|^$/.test(text[begin] ?? "") || /[\p{L}\p{N}]/u.test(text[at - 1] ?? ""))) return null;
  const end = mathEnd(text, begin, mark);
  if (end < 0) {
    hopeless.add(mark);
    return null;
  }
  const tex = text.slice(begin, end);
  return tex.trim() ? [formula(tex, mark === "$$" || mark === "\\["), end + mark.length] : null;
}

function mathEnd(text, begin, mark) {
  const close = MATH[mark];
  for (let end = text.indexOf(close, begin); end >= 0; end = text.indexOf(close, end + 1)) {
    const isMoney = mark === "$" && (/\s/.test(text[end - 1]) || /\d/.test(text[end + 1] ?? ""));
    const isEscaped = mark[0] === "$" && text[end - 1] === "\\";
    if (!isMoney && !isEscaped) return end;
  }
  return -1;
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function code(text, at, hopeless) {
  const marks = text.slice(at, at + runLength(text, at));
  if (hopeless.has(marks)) return null;
  let end = at + marks.length;
  for (;;) {
    end = text.indexOf("`", end);
    if (end < 0) {
      hopeless.add(marks);
      return null;
    }
    const run = runLength(text, end);
    if (run === marks.length) break;
    end += run;
  }
  let inner = text.slice(at + marks.length, end).replaceAll("\n", " ");
  if (/^ .*[^ ].* $/.test(inner)) inner = inner.slice(1, -1);
  return [element("code", {}, inner), end + marks.length];
}

function link(text, at) {
  LINK.lastIndex = at;
  const found = LINK.exec(text);
  if (!found || !SAFE_LINK.test(found[2])) return null;
  return [anchor(found[2], found[1] || found[2]), LINK.lastIndex];
}

function address(text, at) {
  ADDRESS.lastIndex = at;
  const found = ADDRESS.exec(text)?.[0].replace(/[.,:;!?*_~\])]{1,9}$/, "");
  return found ? [anchor(found, found), at + found.length] : null;
}

function anchor(href, content) {
  return element("a", { href, target: "_blank", rel: "noopener noreferrer" }, content);
}

function span(text, at, depth, hopeless) {
  const two = text.slice(at, at + 2);
  const marks = two in SPAN ? two : text[at];
  if (!(marks in SPAN) || depth >= DEEPEST || hopeless.has(marks)) return null;
  const begin = at + marks.length;
  const isWord = (character) => /[\p{L}\p{N}]/u.test(character ?? "");
  if (/\s|^$/.test(text[begin] ?? "")) return null;
  if (marks[0] === "_" && isWord(text[at - 1])) return null;
  for (let end = text.indexOf(marks, begin + 1); end >= 0; end = text.indexOf(marks, end + 1)) {
    const run = runLength(text, end);
    const fits = marks.length === 2 ? run >= 2 : run !== 2;
    const closes = fits && !/\s/.test(text[end - 1]) && !(marks[0] === "_" && isWord(text[end + run]));
    if (closes) {
      const last = end + (run - marks.length); // of a longer run the outer marks belong to us
      return [element(SPAN[marks], {}, inline(text.slice(begin, last), depth + 1)), last + marks.length];
    }
    end += run - 1;
  }
  hopeless.add(marks);
  return null;
}
