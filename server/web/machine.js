// The second view: the machine as a picture. Tiers as bars, where each layer's experts are and how often they are
// used, links, and what waits; from the metrics and from one list of places.

import * as api from "./api.js";
import { element } from "./dom.js";
import { bytes, byHeat, percent, title } from "./strip.js";

export const MACHINE = "machine"; // in the address
const ON_DISK = "nvme";
const COLD = 0.22; // opacity of an expert that is not used
const ROW_PX = [3, 14]; // of a layer
const MAP_PX = 420; // all layers, about
const REASONS = { demand: "for what a step needs", prefetch: "for what was prefetched too late" };
const LEAST_S = 0.05; // a shorter wait is not worth a line

const [view, note, parts, tierList, canvas, expertsNote, legend, counts, links, waiting, hottestFirst, button] = [
  "#machine", "#machine-note", "#machine-parts", "#tiers", "#experts", "#experts-note", "#legend", "#expert-counts",
  "#links", "#waiting", "#hottest-first", "#toggle-machine",
].map((selector) => document.querySelector(selector));

export class Machine {
  isShown = false;
  #connection;
  #key;
  #places = null; // as last told
  #before = null; // uses by layer, before that
  #isAsking = false;

  /** `connection` has the metrics, `key()` is the API key to use. */
  constructor(connection, key) {
    this.#connection = connection;
    this.#key = key;
    hottestFirst.addEventListener("change", () => this.#drawExperts());
    addEventListener("resize", () => this.#drawExperts());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#drawExperts());
  }

  /** Show the machine in place of the conversation, or that again. */
  toggle(isShown) {
    this.isShown = isShown;
    view.hidden = !isShown;
    for (const other of ["#scroller", "#composer"]) document.querySelector(other).hidden = isShown;
    button.setAttribute("aria-pressed", String(isShown));
    this.#before = null;
    this.refresh();
  }

  /** Show what is so now, if anybody looks. */
  async refresh() {
    if (!this.isShown || this.#isAsking) return;
    this.#isAsking = true;
    try {
      const before = this.#places;
      this.#places = await api.tiers(this.#key());
      this.#before = before?.layers.map(({ uses }) => uses) ?? null;
      note.textContent = "";
    } catch (error) {
      this.#places = null;
      note.textContent = error.status === 503 ? "The model is being loaded." : error.message;
    } finally {
      this.#isAsking = false;
    }
    this.#draw();
  }

  #draw() {
    const { now, before } = this.#connection;
    parts.hidden = this.#places === null || now === null;
    if (parts.hidden) return;
    tierList.replaceChildren(...tiersOf(this.#places, now, before).map(tierItem));
    this.#drawExperts();
    links.replaceChildren(...table(["link", "now", "busy", "waited for", "in all"], linksOf(now, before)));
    waiting.replaceChildren(...waitingOf(now, before).map((text) => element("li", {}, text)));
  }

  #drawExperts() {
    if (!this.isShown || this.#places === null) return;
    const { tiers, layers } = this.#places;
    const has = layers.length > 0;
    canvas.hidden = !has;
    canvas.parentElement.querySelector("details").hidden = !has;
    canvas.parentElement.querySelector(".below").hidden = !has;
    if (!has) {
      expertsNote.textContent = "This model has no routed experts.";
      return;
    }
    const heat = heatOf(layers, this.#before);
    expertsNote.textContent = noteOf(layers, heat);
    const used = [...new Set(layers.flatMap(({ experts }) => experts))].sort((a, b) => byHeat(tiers[a], tiers[b]));
    const colours = coloursOf(tiers);
    legend.replaceChildren(...used.map((tier) => legendItem(tiers[tier], colours[tier])));
    paint(layers, heat, colours);
    const rows = layers.map(({ layer, experts }) => [
      `${layer}`, ...used.map((tier) => `${experts.filter((each) => each === tier).length}`),
    ]);
    counts.replaceChildren(...table(["layer", ...used.map((tier) => title(tiers[tier]))], rows));
    const held = used.map((tier) => {
      const count = layers.reduce((sum, { experts }) => sum + experts.filter((each) => each === tier).length, 0);
      return `${count} in ${title(tiers[tier])}`;
    });
    canvas.setAttribute("aria-label", `Experts of ${layers.length} layers: ${held.join(", ")}.`);
  }
}

/** Of each tier what it holds, and its share of uses: `{tier, name, total, contents, experts, share, scale}`. */
export function tiersOf({ tiers, layers }, now, before) {
  const grown = (tier) =>
    now.sum("loci_expert_hits_total", { tier }) - before.sum("loci_expert_hits_total", { tier });
  const isQuiet = tiers.every((tier) => grown(tier) <= 0);
  const uses = (tier) => (isQuiet ? now.sum("loci_expert_hits_total", { tier }) : grown(tier));
  const all = tiers.reduce((sum, tier) => sum + uses(tier), 0);
  const found = [...tiers].sort(byHeat).map((tier) => {
    const number = tiers.indexOf(tier);
    const contents = now.values("loci_tier_memory_bytes", "content")
      .map((content) => ({ content, nbytes: now.sum("loci_tier_memory_bytes", { tier, content }) }))
      .filter(({ nbytes }) => nbytes > 0);
    return {
      tier, name: title(tier), contents, isQuiet,
      total: contents.reduce((sum, { nbytes }) => sum + nbytes, 0),
      experts: layers.reduce((sum, { experts }) => sum + experts.filter((each) => each === number).length, 0),
      share: all > 0 ? uses(tier) / all : null,
    };
  });
  const most = Math.max(...found.map(({ total }) => total), 1);
  return found
    .filter(({ total, experts }) => total > 0 || experts > 0)
    .map((each) => ({ ...each, scale: each.total / most }));
}

function tierItem({ tier, name, contents, total, experts, share, isQuiet, scale }) {
  const kind = tier.split(":")[0];
  const held = contents.map(({ content, nbytes }) => `${content} ${bytes(nbytes)}`);
  if (experts > 0) held.push(`${experts} experts` + (tier === ON_DISK ? " on disk only" : ""));
  const served = share === null ? "" : `${percent(share)} of uses ${isQuiet ? "since startup" : "just now"}`;
  const bar = element("div", { className: "memory", ariaHidden: "true" });
  for (const [at, { nbytes }] of contents.entries()) {
    const piece = element("span", { className: `piece piece-${Math.min(at, 3)}` });
    piece.style.width = `${(100 * scale * nbytes) / Math.max(total, 1)}%`;
    bar.append(piece);
  }
  const level = element("span", { className: "uses" });
  level.style.width = `${100 * (share ?? 0)}%`;
  return element("li", { className: kind },
    element("p", {}, element("strong", {}, name), ` ${total > 0 ? bytes(total) : ""}`,
      element("span", { className: "served" }, served)),
    total > 0 ? bar : null,
    share === null ? null : element("div", { className: "track", ariaHidden: "true" }, level),
    element("p", {}, element("small", {}, held.join(", "))));
}

/**
 * How hot each expert is, 0 to 1, by layer: by its uses since the last look, or, where there were none, by all that are
 * remembered. Null where nobody counts.
 */
export function heatOf(layers, before) {
  if (layers.some(({ uses }) => uses === null)) return null;
  const grown = layers.map(({ uses }, n) => uses.map((count, expert) => count - (before?.[n]?.[expert] ?? count)));
  const isLive = grown.some((layer) => layer.some((count) => count > 0.5));
  return layers.map(({ uses }, n) => {
    const counted = isLive ? grown[n].map((count) => Math.max(0, count)) : uses;
    const most = Math.max(...counted, 1e-9);
    return counted.map((count) => Math.sqrt(count / most));
  });
}

function noteOf(layers, heat) {
  const [{ experts }] = layers;
  const rows = `A row for each of ${layers.length} layers, a cell for each of its ${experts.length} experts, ` +
    "in the colour of its tier";
  return heat === null
    ? `${rows}. Nothing moves here, so uses are not counted.`
    : `${rows}; the stronger its colour, the more it was used since the last look, or at all.`;
}

/** Paint experts as cells, each layer a row. */
function paint(layers, heat, colours) {
  const ratio = window.devicePixelRatio || 1;
  const height = Math.min(ROW_PX[1], Math.max(ROW_PX[0], Math.floor(MAP_PX / layers.length)));
  const width = canvas.parentElement.clientWidth;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(layers.length * height * ratio);
  canvas.style.height = `${layers.length * height}px`;
  const pen = canvas.getContext("2d");
  for (const [row, { experts }] of layers.entries()) {
    const order = [...experts.keys()];
    if (hottestFirst.checked && heat !== null) order.sort((a, b) => heat[row][b] - heat[row][a]);
    const top = Math.round(row * height * ratio);
    const bottom = Math.round((row + 1) * height * ratio) - Math.round(ratio);
    for (const [at, expert] of order.entries()) {
      const left = Math.round((at * canvas.width) / order.length);
      const right = Math.round(((at + 1) * canvas.width) / order.length);
      const gap = right - left > 3 * ratio ? Math.round(ratio) : 0;
      pen.globalAlpha = heat === null ? 1 : COLD + (1 - COLD) * heat[row][expert];
      pen.fillStyle = colours[experts[expert]];
      pen.fillRect(left, top, right - left - gap, bottom - top);
    }
  }
}

/** A colour for each tier; further GPUs are nearer to the colour of the text. */
function coloursOf(tiers) {
  const style = getComputedStyle(document.documentElement);
  const hex = (name) => style.getPropertyValue(name).trim();
  return tiers.map((tier) => {
    const [kind, number] = tier.split(":");
    return mixed(hex(`--${kind}`), hex("--ink"), Math.min(0.6, 0.3 * Number(number ?? 0)));
  });
}

function mixed(one, other, share) {
  const at = (text, n) => parseInt(text.slice(1 + 2 * n, 3 + 2 * n), 16);
  const blend = [0, 1, 2].map((n) => Math.round(at(one, n) * (1 - share) + at(other, n) * share));
  return `rgb(${blend.join(" ")})`;
}

function legendItem(tier, colour) {
  const patch = element("span", { className: "patch", ariaHidden: "true" });
  patch.style.background = colour;
  return element("span", { className: "key" }, patch, title(tier));
}

/** Rows of links: name, bytes a second, share of time busy, share of time that computing waited, bytes in all. */
export function linksOf(now, before) {
  const elapsed = (now.readAt - before.askedAt) / 1000;
  const rate = (name, labels) => (elapsed > 0 ? (now.sum(name, labels) - before.sum(name, labels)) / elapsed : 0);
  return now.values("loci_link_bytes_total", "link").sort().map((link) => {
    const speed = rate("loci_link_bytes_total", { link });
    return [
      link, speed > 0 ? `${bytes(speed)}/s` : "–",
      percent(Math.min(1, rate("loci_link_busy_seconds_total", { link }))),
      percent(Math.min(1, rate("loci_stall_seconds_total", { link }))),
      bytes(now.sum("loci_link_bytes_total", { link })),
    ];
  });
}

/** What waits, and for what, a line each. */
export function waitingOf(now, before) {
  const elapsed = (now.readAt - before.askedAt) / 1000;
  const running = now.sum("loci_sequences_running");
  const lines = [
    `${running} ${running === 1 ? "request is" : "requests are"} answered, ` +
      `${now.sum("loci_sequences_waiting")} in the queue, ${now.sum("loci_sequences_aside")} put aside`,
  ];
  for (const link of now.values("loci_stall_seconds_total", "link").sort()) {
    for (const [reason, text] of Object.entries(REASONS)) {
      const all = now.sum("loci_stall_seconds_total", { link, reason });
      if (all < LEAST_S) continue;
      const grown = all - before.sum("loci_stall_seconds_total", { link, reason });
      const share = elapsed > 0 ? Math.min(1, grown / elapsed) : 0;
      lines.push(`Computing waits for ${link}, ${text}: ${percent(share)} of the time now, ${all.toFixed(1)} s in all`);
    }
  }
  return lines;
}

function table(head, rows) {
  return [
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...rows.map(([first, ...rest]) =>
      element("tr", {}, element("th", { scope: "row" }, first), ...rest.map((text) => element("td", {}, text))))),
  ];
}
