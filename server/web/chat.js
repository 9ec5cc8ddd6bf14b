// The one place where the page's state changes: the conversation that is shown, and the answers that are growing.
// Everything else shows this state, or asks for a change of it.

import { ServerError, chat } from "./api.js";
import { Conversation, isUnanswered, messagesOf } from "./conversation.js";
import * as settings from "./settings.js";

const KEEP_MS = 2000; // how often a growing answer is kept
const LEAST_MS = 100; // a shorter time makes no honest figure of tokens per second
const ENDS = { length: "stopped at the token limit" };

/** A growing answer: its `turn`, the tokens of its prompt that were read (`progress`, where the server tells). */
class Run {
  abort = new AbortController();
  progress = null;
  began = performance.now();

  constructor(conversation, turn) {
    this.conversation = conversation;
    this.turn = turn;
  }
}

export class Chat {
  conversation = new Conversation();
  #runs = new Map(); // by the id of the turn
  #gone = new Set(); // ids of deleted conversations, whose answers are not to be kept
  #library;
  #hooks;

  /**
   * hooks: `onShow()` (other turns are shown), `onGrow(turn)`, `onEnd(turn)`, `onBusy()`, `onRefused(status)`,
   * `onTrouble(text)`.
   */
  constructor(library, hooks) {
    this.#library = library;
    this.#hooks = hooks;
  }

  /** The run of a growing turn; undefined where it does not grow. */
  runOf(turn) {
    return this.#runs.get(turn.id);
  }

  /** True while an answer of the shown conversation grows. */
  get isBusy() {
    return this.isAnswering(this.conversation.id);
  }

  /** True while any answer of this page grows. */
  get isAnyBusy() {
    return this.#runs.size > 0;
  }

  /** True while an answer of the conversation of this id grows. */
  isAnswering(id) {
    return [...this.#runs.values()].some((run) => run.conversation.id === id);
  }

  /** Tokens that the shown conversation has used, as the server counted at its last answer. */
  get usedTokens() {
    const usage = this.conversation.path.findLast((turn) => turn.usage)?.usage;
    return usage ? usage.prompt_tokens + usage.completion_tokens : 0;
  }

  /** Show an empty conversation. It is kept as soon as something is said. */
  begin() {
    this.#show(new Conversation());
  }

  /** Show the conversation of this id; an empty one where there is none. */
  async open(id) {
    this.#show((await this.find(id)) ?? new Conversation());
  }

  /** Say something at the end of the shown conversation. */
  say(content, files = []) {
    this.#ask({ role: "user", content, files }, this.conversation.path.at(-1) ?? null);
  }

  /** Put a question differently: another version of it, with an answer of its own. False where it cannot be done. */
  rephrase(question, content) {
    if (this.isBusy || !(content || question.files?.length)) return false;
    const before = this.conversation.turns.find((each) => each.id === question.parent) ?? null;
    this.#ask({ role: "user", content, files: question.files }, before);
    return true;
  }

  /** Another version of an answer; instead of it, where it has no word and nothing follows. */
  repeat(answer) {
    if (this.isBusy) return;
    const question = this.conversation.turns.find((each) => each.id === answer.parent) ?? null;
    if (isUnanswered(answer) && !this.conversation.hasMoreAfter(answer)) this.conversation.remove(answer);
    this.#answer(this.conversation, question);
  }

  /** Go on with an answer that ended early. */
  resume(answer) {
    if (this.isBusy) return;
    const { conversation } = this;
    const path = conversation.pathTo(answer);
    delete answer.error;
    this.#run(conversation, answer, () => ({
      ...settings.request(messagesOf(path)), continue_final_message: true, add_generation_prompt: false,
    }));
  }

  /** Show another version of a turn. */
  choose(turn) {
    if (this.isBusy) return;
    this.conversation.choose(turn);
    this.#changed();
  }

  /** Change the words of a turn, and nothing else. False where there are none: that would be to delete it. */
  reword(turn, content) {
    if (!content) return false;
    turn.content = content;
    this.#changed();
    return true;
  }

  /** Take out a turn; returns the function that undoes it. */
  remove(turn) {
    const { conversation } = this;
    const undo = conversation.remove(turn);
    this.#changed();
    return () => {
      undo();
      this.#keep(conversation);
      if (conversation === this.conversation) this.#hooks.onShow();
    };
  }

  /** Give a conversation another title. */
  async rename(id, title) {
    const conversation = await this.find(id);
    conversation.title = title;
    if (conversation === this.conversation) this.#hooks.onShow();
    await this.#keep(conversation, conversation.changed);
  }

  /** Forget a conversation; returns the function that undoes it. */
  async delete(id) {
    const conversation = await this.find(id);
    this.#gone.add(id);
    for (const run of this.#runs.values()) if (run.conversation === conversation) run.abort.abort();
    await this.#library.delete(id);
    if (id === this.conversation.id) this.begin();
    return async () => {
      this.#gone.delete(id);
      await this.#keep(conversation, conversation.changed);
    };
  }

  /** End the growing answer that is shown; what there is of it stays. */
  stop() {
    for (const run of this.#runs.values()) if (run.conversation === this.conversation) run.abort.abort();
  }

  /** Another tab changed the conversation of this id: take over what it did. */
  async refresh(id) {
    const [here, there] = [await this.find(id, false), await this.#library.get(id)];
    if (!here || !there) return;
    here.take(there, (turn) => this.#runs.has(turn.id));
    if (here === this.conversation) this.#hooks.onShow();
  }

  /** The conversation of this id, the very one that is shown or growing where it is. */
  async find(id, isWanted = true) {
    if (id === this.conversation.id) return this.conversation;
    const running = [...this.#runs.values()].find((run) => run.conversation.id === id);
    return running?.conversation ?? (isWanted ? this.#library.get(id) : null);
  }

  #show(conversation) {
    this.conversation = conversation;
    this.#hooks.onShow();
    this.#hooks.onBusy();
  }

  #changed() {
    this.#hooks.onShow();
    this.#keep(this.conversation);
  }

  #ask(question, before) {
    this.#answer(this.conversation, this.conversation.add(question, before));
  }

  #answer(conversation, question) {
    const path = question ? conversation.pathTo(question) : [];
    const turn = conversation.add({ role: "assistant", content: "", reasoning: "" }, question);
    this.#run(conversation, turn, () => settings.request(messagesOf(path)));
  }

  async #run(conversation, turn, request) {
    // Where the page is closed before the end, and in other tabs until then, this is what is known of it.
    turn.note = "not finished";
    const run = new Run(conversation, turn);
    this.#runs.set(turn.id, run);
    this.#hooks.onShow();
    this.#hooks.onBusy();
    this.#keep(conversation);
    try {
      await this.#grow(run, request());
    } catch (error) {
      turn.note = run.abort.signal.aborted ? "stopped" : "";
      if (!run.abort.signal.aborted) {
        turn.error = error.message;
        if (!(error instanceof ServerError)) console.error(error);
        this.#hooks.onRefused(error.status);
      }
    }
    this.#runs.delete(turn.id);
    if (conversation === this.conversation) this.#hooks.onEnd(turn);
    this.#hooks.onBusy();
    await this.#keep(conversation);
  }

  async #grow(run, body) {
    const { conversation, turn } = run;
    let keptAt = performance.now();
    let firstAt = null;
    for await (const piece of chat(body, settings.apiKey(), run.abort.signal)) {
      const now = performance.now();
      if (piece.progress) run.progress = piece.progress;
      if (piece.reasoning || piece.content) {
        firstAt ??= now;
        turn.firstMs = Math.round(firstAt - run.began);
        turn.ms = Math.round(now - firstAt);
        turn.reasoning += piece.reasoning ?? "";
        turn.content += piece.content ?? "";
      }
      if (piece.finish) turn.note = ENDS[piece.finish] ?? "";
      if (piece.usage) turn.usage = piece.usage;
      if (conversation === this.conversation) this.#hooks.onGrow(turn);
      if (now - keptAt > KEEP_MS) {
        keptAt = now;
        this.#keep(conversation);
      }
    }
  }

  async #keep(conversation, changed = Date.now()) {
    if (this.#gone.has(conversation.id)) return;
    conversation.changed = changed;
    try {
      await this.#library.put(conversation);
    } catch (error) {
      this.#hooks.onTrouble(error.message);
    }
  }
}

/** What is known of an answer's pace, in words. */
export function paceOf({ usage, firstMs, ms }) {
  if (!usage || firstMs === undefined) return "";
  const tokens = usage.completion_tokens;
  const speed = ms >= LEAST_MS && tokens > 1 ? `${((tokens - 1) / (ms / 1000)).toFixed(1)} tokens/s` : "";
  const first = `first after ${(firstMs / 1000).toFixed(1)} s`;
  return [`${tokens} ${tokens === 1 ? "token" : "tokens"}`, speed, first].filter(Boolean).join(" · ");
}
