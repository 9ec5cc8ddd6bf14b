// The conversation: what was said so far, asking for the next answer, editing, repeating, stopping.
// It is kept for this tab, so that a reload loses nothing.

import { ServerError, chat } from "./api.js";
import { Answer, addQuestion, dropFrom } from "./messages.js";
import * as settings from "./settings.js";

const PLACE = "loci.conversation";
const ENDS = { length: "stopped at the token limit" };

/** Turns alternate: `{role: "user", content}` and `{role: "assistant", content, reasoning, note, tokens}`. */
export class Conversation {
  #turns = [];
  #abort = null;
  #hooks;

  /** hooks: `onBusy(isBusy)`, `onSaid(text)` for screen readers, `onEdit(index, text)`, `onKeyNeeded(why)`. */
  constructor(hooks) {
    this.#hooks = hooks;
    for (const turn of stored()) this.#show(turn);
  }

  /** True while an answer is growing. */
  get isBusy() {
    return this.#abort !== null;
  }

  /** Forget everything. */
  clear() {
    this.stop();
    this.#truncate(0);
  }

  /** End the growing answer; what there is of it stays. */
  stop() {
    this.#abort?.abort();
  }

  /** Say `text`, as the turn at `index` (the end unless told), and get an answer. */
  async say(text, index = this.#turns.length) {
    this.#truncate(index);
    this.#show({ role: "user", content: text });
    await this.#answer();
  }

  async #repeat(index) {
    if (this.isBusy) return;
    this.#truncate(index);
    await this.#answer();
  }

  async #answer() {
    const abort = new AbortController();
    this.#abort = abort;
    this.#hooks.onBusy(true);
    const answer = this.#newAnswer();
    const body = settings.request(this.#answered().map(({ role, content }) => ({ role, content })));
    const turn = { role: "assistant", content: "", reasoning: "", note: "", tokens: null };
    try {
      for await (const piece of chat(body, settings.apiKey(), abort.signal)) {
        answer.push(piece);
        if (piece.finish) turn.note = ENDS[piece.finish] ?? "";
        if (piece.usage) turn.tokens = piece.usage.completion_tokens;
      }
      answer.finish(turn.note, turn.tokens);
    } catch (error) {
      if (abort.signal.aborted) {
        turn.note = "stopped";
        answer.finish(turn.note);
      } else {
        answer.fail(error.message);
        if (!(error instanceof ServerError)) console.error(error);
        if (error.status === 401) this.#hooks.onKeyNeeded(error.message);
      }
    }
    this.#abort = null;
    const isGone = !answer.item.isConnected; // the conversation was cleared meanwhile
    if (!isGone && (answer.content || turn.note)) {
      this.#turns.push({ ...turn, content: answer.content, reasoning: answer.reasoning });
      this.#keep();
    }
    this.#hooks.onBusy(false);
    if (!isGone) this.#hooks.onSaid(answer.text.innerText || turn.note);
  }

  /** The turns without questions that got no answer: templates want roles to alternate. */
  #answered() {
    return this.#turns.filter((turn, i, all) => turn.role !== "user" || all[i + 1]?.role !== "user");
  }

  #newAnswer() {
    const index = this.#turns.length;
    return new Answer(() => this.#repeat(index));
  }

  #show(turn) {
    const index = this.#turns.length;
    if (turn.role === "user") addQuestion(turn.content, () => this.#hooks.onEdit(index, turn.content));
    else {
      const answer = this.#newAnswer();
      answer.push(turn);
      answer.finish(turn.note);
    }
    this.#turns.push(turn);
    this.#keep();
  }

  #truncate(index) {
    dropFrom(index);
    this.#turns.length = Math.min(index, this.#turns.length);
    this.#keep();
  }

  #keep() {
    try {
      sessionStorage.setItem(PLACE, JSON.stringify(this.#turns));
    } catch {
      // Full storage: the conversation goes on, a reload would lose it.
    }
  }
}

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(PLACE)) ?? [];
  } catch {
    return [];
  }
}
