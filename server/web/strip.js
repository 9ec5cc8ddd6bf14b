// The strip below the title: what lies in which tier, where experts were found lately, what was waited for.
// It reads the same metrics as Prometheus and shows what changed between two readings.

import { metrics } from "./api.js";
import { element } from "./dom.js";

const BUSY_MS = 1000;
const IDLE_MS = 5000;

/**
 * Keeps `strip` up to date while the page is seen: now and then, each second while an answer grows, and at once
 * when one begins or ends. Returns the function that is to be told `isBusy` then.
 */
export function watchTiers(strip, apiKey) {
  let isBusy = false;
  let seen = []; // the last readings, oldest first
  let isDue = false; // also while a reading is under way, which may be from before
  let wake = () => {};

  async function look() {
    try {
      const now = new Reading(await metrics(apiKey()));
      const before = seen.findLast((each) => now.readAt - each.readAt > BUSY_MS * 0.9) ?? seen[0] ?? now;
      strip.replaceChildren(...figures(now, before).map(cell));
      strip.hidden = strip.children.length === 0;
      seen = [...seen.slice(-2), now];
    } catch {
      strip.hidden = true; // the line of the model says what is wrong
    }
  }

  async function watch() {
    for (;;) {
      isDue = false;
      if (!document.hidden) await look();
      if (isDue) continue;
      await new Promise((resolve) => {
        wake = resolve;
        setTimeout(resolve, isBusy ? BUSY_MS : IDLE_MS);
      });
    }
  }

  watch();
  return (isBusyNow) => {
    isBusy = isBusyNow;
    if (isBusy) seen = []; // what is shown of an answer is about nothing before it
    isDue = true;
    wake();
  };
}

/** One page of metrics: samples by name and labels, and when it was read. */
export class Reading {
  constructor(text, readAt = performance.now()) {
    this.readAt = readAt;
    this.samples = text
      .split("\n")
      .filter((line) => line && !line.startsWith("#"))
      .map((line) => /^([a-z_]+)(?:\{(.*)\})? (\S+)/.exec(line))
      .filter(Boolean)
      .map(([, name, labels, value]) => ({ name, labels: labelsOf(labels ?? ""), value: Number(value) }));
  }

  /** The sum of the samples of this name that have these labels. */
  sum(name, labels = {}) {
    const wanted = Object.entries(labels);
    return this.samples
      .filter((each) => each.name === name && wanted.every(([key, value]) => each.labels[key] === value))
      .reduce((total, each) => total + each.value, 0);
  }

  /** The values that a label of this metric has. */
  values(name, label) {
    return [...new Set(this.samples.filter((each) => each.name === name).map((each) => each.labels[label]))];
  }
}

function labelsOf(text) {
  return Object.fromEntries([...text.matchAll(/(\w+)="([^"]*)"/g)].map(([, key, value]) => [key, value]));
}

/** The cells of the strip: `{name, value, share, kind, title}`. `share` is 0 to 1 where there is a bar. */
export function figures(now, before) {
  const elapsed = (now.readAt - before.readAt) / 1000;
  const grown = (name, labels) => now.sum(name, labels) - before.sum(name, labels);
  // While nothing is computed, what counts is the whole time since the start.
  const isQuiet = grown("loci_experts_computed_total") <= 0;
  const uses = isQuiet ? (name, labels) => now.sum(name, labels) : grown;

  const tiers = now.values("loci_tier_memory_bytes", "tier").sort(byHeat);
  const experts = now.sum("loci_experts");
  const expertsText = (tier) => {
    const count = now.sum("loci_experts", { tier });
    return experts > 0 ? ` ${count} of ${experts} experts are here.` : "";
  };
  const all = uses("loci_expert_hits_total");
  const hitShare = (tier) => (all > 0 ? uses("loci_expert_hits_total", { tier }) / all : null);
  const when = isQuiet ? "since startup" : "just now";
  const shareText = (tier) => {
    const share = hitShare(tier);
    return share === null ? "" : ` ${percent(share)} of expert uses were served from here ${when}.`;
  };

  const cells = tiers.map((tier) => {
    const held = now.sum("loci_tier_memory_bytes", { tier });
    return {
      name: title(tier), value: bytes(held), share: hitShare(tier), kind: tier.split(":")[0],
      title: `${title(tier)} holds ${bytes(held)}.${expertsText(tier)}${shareText(tier)}`,
    };
  });
  const onDisk = now.sum("loci_experts", { tier: "nvme" });
  const read = now.sum("loci_link_bytes_total", { link: "nvme" });
  if (onDisk > 0) {
    const rate = elapsed > 0 ? grown("loci_link_bytes_total", { link: "nvme" }) / elapsed : 0;
    cells.push({
      name: "NVMe", value: rate > 0 ? `${bytes(rate)}/s` : `${onDisk} experts`, share: hitShare("nvme"),
      kind: "nvme", title: `${bytes(read)} read from disk.${expertsText("nvme")}${shareText("nvme")}`,
    });
  }
  if (all > 0) {
    const stalled = elapsed > 0 ? grown("loci_stall_seconds_total") / elapsed : 0;
    cells.push({
      name: "Stalled", value: percent(Math.min(stalled, 1)), share: Math.min(stalled, 1), kind: "stall",
      title: `Share of time that computation was stalled on transfers; ` +
        `${now.sum("loci_stall_seconds_total").toFixed(1)} s since startup.`,
    });
  }
  const room = now.sum("loci_kv_tokens_capacity");
  if (room > 0) {
    const used = now.sum("loci_kv_tokens_used");
    const speed = elapsed > 0 ? grown("loci_generated_tokens_total") / elapsed : 0;
    cells.push(
      {
        name: "Context", value: percent(used / room), share: used / room, kind: "kv",
        title: `The KV cache holds ${used} of ${room} tokens.`,
      },
      {
        name: "Tokens/s", value: speed > 0 ? speed.toFixed(1) : "–", share: null, kind: "speed",
        title: "Tokens generated per second, for all clients of this server.",
      },
    );
  }
  return cells;
}

function cell({ name, value, share, kind, title: explanation }) {
  const bar = element("span", { className: "level", ariaHidden: "true" });
  bar.style.width = `${Math.round((share ?? 0) * 100)}%`;
  return element("div", { className: `cell ${kind}`, title: explanation },
    element("dt", {}, name), element("dd", {}, value, share === null ? null : bar));
}

const ORDER = ["vram", "dram", "nvme"];

function byHeat(a, b) {
  const rank = (tier) => ORDER.indexOf(tier.split(":")[0]);
  return rank(a) - rank(b) || a.localeCompare(b);
}

function title(tier) {
  const [kind, number] = tier.split(":");
  return { vram: "VRAM", dram: "DRAM", nvme: "NVMe" }[kind] + (number === undefined ? "" : ` ${number}`);
}

const percent = (share) => `${Math.round(share * 100)} %`;

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (count >= 1000 && power < units.length - 1) {
    count /= 1000;
    power += 1;
  }
  return `${count < 10 && power > 0 ? count.toFixed(1) : Math.round(count)} ${units[power]}`;
}
