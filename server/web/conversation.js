// A conversation as data: a tree of turns. Another answer to a question, or a question put differently, is another
// child of the same turn, so nothing that was said is lost; the path of chosen children is what the page shows.

/**
 * Turns are `{id, parent, role, content}`, where `parent` is the id of the turn before, or "" at the beginning.
 * Questions (`role: "user"`) may have `files: [{name, text}]`; answers (`role: "assistant"`) have `reasoning`, `note`
 * (why they ended, where that is not obvious), `error`, `usage` as the server counted, and `firstMs` and `ms`.
 */
export class Conversation {
  constructor({ id = newId(), title = "", changed = 0, turns = [], chosen = {} } = {}) {
    Object.assign(this, { id, title, changed, turns, chosen });
  }

  /** The shown turns, from first to last. */
  get path() {
    const path = [];
    for (let next = this.#shownBelow(""); next; next = this.#shownBelow(next.id)) path.push(next);
    return path;
  }

  /** What lists call it: its title, or how its first question begins. */
  get name() {
    const first = this.path[0];
    const text = this.title || first?.content || first?.files?.[0]?.name || "";
    return text.replace(/\s+/g, " ").trim().slice(0, 80) || "Empty conversation";
  }

  /** The turns in the place of this one, oldest first: all versions of an answer, or of a question. */
  versions(turn) {
    return this.turns.filter((each) => each.parent === turn.parent);
  }

  /** True where anything was said after this turn, in whatever version. */
  hasMoreAfter(turn) {
    return this.turns.some((each) => each.parent === turn.id);
  }

  /** The shown turns up to this one. */
  pathTo(turn) {
    const path = this.path;
    return path.slice(0, path.indexOf(turn) + 1);
  }

  /** Put a turn after `before` (a turn, or null at the beginning) and show it; returns it. */
  add(turn, before) {
    const added = { id: newId(), parent: before?.id ?? "", ...turn };
    this.turns.push(added);
    this.choose(added);
    return added;
  }

  /** Show this version among its siblings, and what was said after it. */
  choose(turn) {
    this.chosen[turn.parent] = turn.id;
  }

  /**
   * Take out one turn. Where it is the only version, what follows it stays and moves up; otherwise the version goes
   * with what was said after it. Returns the function that undoes it.
   */
  remove(turn) {
    const before = this.turns.map((each) => [each, each.parent]);
    const chosen = { ...this.chosen };
    this.#remove(turn);
    return () => {
      const known = new Set(before.map(([each]) => each));
      for (const [each, parent] of before) each.parent = parent;
      this.turns = [...known, ...this.turns.filter((each) => !known.has(each))];
      this.chosen = chosen;
    };
  }

  /**
   * Become what `other` is, the same conversation as another page has left it, except for turns that grow here
   * (`isGrowing(turn)`). Turns that both have stay the same objects.
   */
  take(other, isGrowing) {
    const mine = new Map(this.turns.map((each) => [each.id, each]));
    const growing = this.turns.filter(isGrowing);
    const theirs = other.turns.filter((each) => !growing.some(({ id }) => id === each.id));
    this.turns = [...theirs.map((each) => Object.assign(mine.get(each.id) ?? {}, each)), ...growing];
    this.chosen = growing.length > 0 ? { ...other.chosen, ...this.chosen } : other.chosen;
    this.title = other.title;
  }

  #remove(turn) {
    const versions = this.versions(turn);
    if (versions.length === 1) {
      for (const each of this.turns) if (each.parent === turn.id) each.parent = turn.parent;
      this.chosen[turn.parent] = this.chosen[turn.id];
      this.#forget(new Set([turn.id]));
      return;
    }
    const gone = new Set([turn.id]);
    // Children stand behind their parents, except those that moved up, which stand behind an older one all the same.
    for (const each of this.turns) if (gone.has(each.parent)) gone.add(each.id);
    this.#forget(gone);
    const left = versions.filter((each) => each !== turn);
    this.chosen[turn.parent] = left[Math.min(versions.indexOf(turn), left.length - 1)].id;
  }

  #forget(ids) {
    this.turns = this.turns.filter((each) => !ids.has(each.id));
    for (const id of ids) delete this.chosen[id];
  }

  #shownBelow(id) {
    const below = this.turns.filter((each) => each.parent === id);
    return below.find((each) => each.id === this.chosen[id]) ?? below.at(-1);
  }
}

/**
 * The messages that the model is sent for a path of turns. A question that got no answer is left out with it (it may
 * be the reason of the failure), except the last, which is to be answered. Where a deletion left two turns of one role
 * side by side they become one message, because templates want roles to alternate.
 */
export function messagesOf(path) {
  const messages = [];
  path.forEach((turn, i) => {
    if (isUnanswered(turn) || (turn.role === "user" && path[i + 1] && isUnanswered(path[i + 1]))) return;
    const content = turn.files?.length ? withFiles(turn) : turn.content;
    const last = messages.at(-1);
    if (last?.role === turn.role) last.content += `\n\n${content}`;
    else messages.push({ role: turn.role, content });
  });
  return messages;
}

/** True for an answer without a word. */
export const isUnanswered = (turn) => turn.role === "assistant" && !turn.content;

/** The attached files, each in a fence longer than any within it, then the question. */
function withFiles({ content, files }) {
  const blocks = files.map(({ name, text }) => {
    const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map(([run]) => run.length));
    const fence = "`".repeat(longest + 1);
    return `${name}\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
  });
  return [...blocks, content].filter(Boolean).join("\n\n");
}

/** The conversation as Markdown, as it is shown. */
export function asMarkdown(conversation) {
  const turns = conversation.path.map((turn) => {
    const text = turn.files?.length ? withFiles(turn) : turn.content;
    return `## ${turn.role === "user" ? "Question" : "Answer"}\n\n${text.trim() || `(${turn.error || turn.note})`}\n`;
  });
  return [`# ${conversation.name}\n`, ...turns].join("\n");
}

/** A name of its own. (`crypto.randomUUID` is missing on pages served over plain http to another machine.) */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
