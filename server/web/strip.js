// The strip below the title: what lies in which tier, where experts were found lately, what was waited for and guessed
// ahead, and how much of its context the conversation has used. It shows what changed between two readings of the metrics.

import { element } from "./dom.js";

const NEARLY_FULL = 0.9;

/** Show a connection's readings, and `used` of `room` tokens of context, in `strip`. */
export function showStrip(strip, { now, before }, used, room) {
  strip.hidden = now === null;
  if (now === null) return; // the line of the model says what is wrong
  const cells = figures(now, before);
  if (room > 0) cells.push(context(used, room));
  strip.replaceChildren(...cells.map(cell));
}

/** The cells of the strip: `{name, value, share, kind, title}`. `share` is 0 to 1 where there is a bar. */
export function figures(now, before) {
  // From before the one was asked for to after the other had come: a rate may be too low by that, never too high.
  const elapsed = (now.readAt - before.askedAt) / 1000;
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
  const speed = elapsed > 0 ? grown("loci_generated_tokens_total") / elapsed : 0;
  cells.push({
    name: "Tokens/s", value: speed > 0 ? speed.toFixed(1) : "–", share: null, kind: "speed",
    title: "Tokens generated per second, for all clients of this server.",
  });
  const drafted = grown("loci_drafted_tokens_total");
  if (drafted > 0) {
    const right = grown("loci_accepted_draft_tokens_total");
    cells.push({
      name: "Drafts", value: percent(right / drafted), share: Math.min(right / drafted, 1), kind: "drafts",
      title: `Of ${drafted} tokens guessed ahead, ${right} were right just now, for all clients of this server; ` +
        "answers are the same without them.",
    });
  }
  const waiting = now.sum("loci_sequences_waiting");
  if (waiting > 0) {
    const running = now.sum("loci_sequences_running");
    cells.push({
      name: "Waiting", value: `${waiting}`, share: null, kind: "waiting",
      title: `Requests in the queue, while ${running} are being answered, for all clients of this server.`,
    });
  }
  return cells;
}

/** The cell of the context: tokens of this conversation, of what the model may have. */
function context(used, room) {
  return {
    name: "Context", value: percent(used / room), share: Math.min(used / room, 1),
    kind: used > room * NEARLY_FULL ? "context full" : "context",
    title: used > 0
      ? `This conversation has used ${used} of ${room} tokens of context.`
      : `The model has ${room} tokens of context; the first answer tells how many this conversation uses.`,
  };
}

function cell({ name, value, share, kind, title: explanation }) {
  const bar = element("span", { className: "level", ariaHidden: "true" });
  bar.style.width = `${Math.round((share ?? 0) * 100)}%`;
  return element("div", { className: `cell ${kind}`, title: explanation },
    element("dt", {}, name), element("dd", {}, value, share === null ? null : bar));
}

const ORDER = ["vram", "dram", "nvme"];

/** Tiers from the fastest on. */
export function byHeat(a, b) {
  const rank = (tier) => ORDER.indexOf(tier.split(":")[0]);
  return rank(a) - rank(b) || a.localeCompare(b);
}

/** A tier as people call it. */
export function title(tier) {
  const [kind, number] = tier.split(":");
  return { vram: "VRAM", dram: "DRAM", nvme: "NVMe" }[kind] + (number === undefined ? "" : ` ${number}`);
}

export const percent = (share) => `${Math.round(share * 100)} %`;

/** A number of bytes with its unit. */
export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (count >= 1000 && power < units.length - 1) {
    count /= 1000;
    power += 1;
  }
  return `${count < 10 && power > 0 ? count.toFixed(1) : Math.round(count)} ${units[power]}`;
}
