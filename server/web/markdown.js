// Markdown as models write it, to elements. Safe by construction: the only way from text to page is a
// text node, HTML in the text stays text, links go to http, https and mailto, and nothing is loaded.

import { copyButton, element } from "./dom.js";
import { formula } from "./formula.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

const DEEPEST = 12; // of quotes and lists within each other; deeper ones stay text
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])([ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const FORMULA = /^ {0,3}(\\\[|\$\$)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;

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
  const found = FORMULA.test(line) ? displayed(lines, at) : null;
  if (found) return found;
  let end = at + 1;
  while (end < lines.length && !interruptsParagraph(lines, end)) end += 1;
  return [{ kind: "paragraph", text: lines.slice(at, end).join("\n") }, end];
}

function interruptsParagraph(lines, at) {
  const line = lines[at];
  const begins = [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));
  const isFormula = () => FORMULA.test(line) && displayed(lines, at) !== null;
  return line.trim() === "" || begins || isTable(lines, at) || isFormula();
}

function fenced(lines, at, [, marks, language]) {
  let end = at + 1;
  const closes = (line) => {
    const text = line.trim();
    return text.length >= marks.length && text === marks[0].repeat(text.length);
  };
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  const isWhole = end < lines.length;
  return [{ kind: "code", language: language.trim().split(/\s/)[0], code, isWhole }, Math.min(end + 1, lines.length)];
}

/** A formula on lines of its own, null where it does not end so. TeX allows no empty line within one. */
function displayed(lines, at) {
  const [begin, mark] = FORMULA.exec(lines[at]);
  const close = mark === "$$" ? "$$" : "\\]";
  const inner = [lines[at].slice(begin.length)];
  for (let end = at; ; inner.push(lines[end])) {
    const found = inner.at(-1).indexOf(close);
    if (found >= 0) {
      if (inner.at(-1).slice(found + close.length).trim()) return null;
      inner[inner.length - 1] = inner.at(-1).slice(0, found);
      return [{ kind: "formula", tex: inner.join("\n") }, end + 1];
    }
    end += 1;
    if (end >= lines.length || lines[end].trim() === "") return null;
  }
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
    case "formula":
      return formula(block.tex, true);
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

function codeBlock({ language, code, isWhole }) {
  const bar = element("div", { className: "code-bar" }, element("span", {}, language), copyButton(() => code));
  // Long lines scroll, and what scrolls must be reachable by keyboard.
  const text = element("code", {}, code);
  const pre = element("pre", { tabIndex: 0 }, text);
  if (isWhole) highlight(text, code, language); // not anew for every line that it grows by
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
