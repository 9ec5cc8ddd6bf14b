// Markdown as models write it, to elements. Safe by construction: the only way from text to page is a
// text node, HTML in the text stays text, links go to http, https and mailto, and nothing is loaded.

import { copyButton, element } from "./dom.js";

const DEEPEST = 12; // of quotes, lists and emphasis within each other; deeper ones stay text
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])([ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const SAFE_LINK = /^(https?:\/\/|mailto:)/i;

/**
 * Shows `text` in `parent`. Called again with a longer text it rebuilds only the blocks that changed, so that
 * what is selected or focused above the growing end stays so.
 */
export function render(parent, text) {
  const before = parent.shownBlocks ?? [];
  const blocks = blocksOf(text.replace(/\r\n?/g, "\n").split("\n"));
  let same = 0;
  while (same < before.length && same < blocks.length && before[same] === blocks[same].source) same += 1;
  while (parent.childNodes.length > same) parent.lastChild.remove();
  for (const block of blocks.slice(same)) parent.append(built(block, 0));
  parent.shownBlocks = blocks.map((block) => block.source);
}

// Blocks: `{kind, source, ...}`, where `source` are the lines that it was made of.

function blocksOf(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at);
    block.source = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function blockAt(lines, at) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (QUOTE.test(line)) return quoted(lines, at);
  if (ITEM.test(line)) return listed(lines, at);
  if (isTable(lines, at)) return tabled(lines, at);
  let end = at + 1;
  while (end < lines.length && !interruptsParagraph(lines, end)) end += 1;
  return [{ kind: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

function interruptsParagraph(lines, at) {
  const line = lines[at];
  const begins = [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
  return line.trim() === "" || begins || isTable(lines, at);
}

function fenced(lines, at, [, marks, language]) {
  let end = at + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= marks.length && text === marks[0].repeat(text.length);
  };
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return [{ kind: "code", language: language.trim().split(/\s/)[0], code }, Math.min(end + 1, lines.length)];
}

function quoted(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  return [{ kind: "quote", lines: lines.slice(at, end).map((line) => line.replace(QUOTE, "")) }, end];
}

function listed(lines, at) {
  const isOrdered = (mark) => /\d/.test(mark);
  const [, margin, firstMark] = ITEM.exec(lines[at]);
  const ordered = isOrdered(firstMark);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    const indent = line.length - line.trimStart().length;
    if (item && item[1].length <= margin.length + 1 && !RULE.test(line)) {
      if (isOrdered(item[2]) !== ordered || item[1].length < margin.length) break;
      items.push({ width: item[1].length + item[2].length + 1, lines: [line.slice(item[0].length)] });
    } else if (line.trim() === "") {
      const next = lines.slice(end + 1).find((later) => later.trim() !== "");
      const goesOn = next !== undefined && (ITEM.test(next) || next.startsWith(" ".repeat(margin.length + 2)));
      if (!goesOn) break;
      items.at(-1).lines.push("");
    } else if (indent >= margin.length + 2 || !interruptsParagraph(lines, end)) {
      if (indent < margin.length + 2 && lines[end - 1].trim() === "") break;
      const { width } = items.at(-1);
      items.at(-1).lines.push(line.slice(Math.min(indent, width)));
    } else break;
    end += 1;
  }
  const start = ordered ? Number.parseInt(firstMark, 10) : null;
  return [{ kind: "list", start, items: items.map((item) => item.lines) }, end];
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|") || !lines[at + 1].includes("-")) return false;
  const marks = cells(lines[at + 1]);
  return marks.length === cells(lines[at]).length && marks.every((mark) => /^:?-+:?$/.test(mark));
}

function tabled(lines, at) {
  const align = cells(lines[at + 1]).map((mark) =>
    mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : "left",
  );
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  return [{ kind: "table", head: cells(lines[at]), align, rows: lines.slice(at + 2, end).map(cells) }, end];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

// Elements of blocks.

function built(block, depth) {
  switch (block.kind) {
    case "heading": // the page has an h1, an answer begins at h3
      return element(`h${Math.min(block.level + 2, 6)}`, {}, inline(block.text));
    case "rule":
      return element("hr");
    case "code":
      return codeBlock(block);
    case "quote":
      return element("blockquote", {}, ...within(block.lines, depth));
    case "list": {
      const tag = block.start === null ? "ul" : "ol";
      const list = element(tag, {}, ...block.items.map((lines) => listItem(lines, depth)));
      if (block.start !== null) list.start = block.start;
      return list;
    }
    case "table":
      return table(block);
    default:
      return element("p", {}, inline(block.text));
  }
}

function within(lines, depth) {
  if (depth >= DEEPEST) return [element("p", {}, lines.join("\n"))];
  return blocksOf(lines).map((block) => built(block, depth + 1));
}

function listItem(lines, depth) {
  const children = within(lines, depth);
  const isTight = !lines.slice(0, -1).includes("");
  // A tight item is its text; paragraphs would space it out.
  return element("li", {}, ...children.flatMap((child) =>
    isTight && child.tagName === "P" ? [...child.childNodes] : [child],
  ));
}

function codeBlock({ language, code }) {
  const bar = element("div", { className: "code-bar" }, element("span", {}, language), copyButton(() => code));
  // Long lines scroll, and what scrolls must be reachable by keyboard.
  const pre = element("pre", { tabIndex: 0 }, element("code", {}, code));
  return element("div", { className: "code" }, bar, pre);
}

function table({ head, align, rows }) {
  const row = (tag, texts) =>
    element("tr", {}, ...head.map((_, i) => {
      const cell = element(tag, { className: align[i] }, inline(texts[i] ?? ""));
      if (tag === "th") cell.scope = "col";
      return cell;
    }));
  const body = element("tbody", {}, ...rows.map((texts) => row("td", texts)));
  const whole = element("table", {}, element("thead", {}, row("th", head)), body);
  return element("div", { className: "table", tabIndex: 0 }, whole);
}

// Text within a block.

const SPAN = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const LINK = /!?\[([^[\]\n]{0,999})\]\(\s{0,9}<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,999}\)[^\s()<>]{0,999}){0,9})>?(?:\s{1,9}"[^"\n]{0,999}")?\s{0,9}\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`]{1,2000}/y;

function inline(text, depth = 0) {
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
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
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
