// The shown conversation as a list of messages that grows at its end.

import { Answer } from "./answer.js";
import { question } from "./question.js";

const list = document.querySelector("#messages");
const scroller = document.querySelector("#scroller");
const welcome = document.querySelector("#welcome");

const NEAR_END_PX = 80; // whoever has scrolled up further wants to stay there

/** Scroll to the end. */
function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
}

const isNearEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END_PX;

// A keyboard that opens on a phone, or one that is turned, must not hide the end from who was there.
let wasNearEnd = true;
scroller.addEventListener("scroll", () => (wasNearEnd = isNearEnd()));
new ResizeObserver(() => {
  if (wasNearEnd) toEnd();
}).observe(scroller);

/** Keeps the list as the state says. Items of turns that did not change stay, with what is selected in them. */
export class Messages {
  #chat;
  #actions;
  #shown = []; // `{turn, state, item, answer}`
  #conversation = null;

  /** `actions` are what the buttons of a message do: `rephrase`, `reword`, `remove`, `repeat`, `resume`, `choose`. */
  constructor(chat, actions) {
    this.#chat = chat;
    this.#actions = actions;
  }

  /** Show the path of the conversation as it is now. */
  show() {
    const { conversation } = this.#chat;
    const isOther = conversation !== this.#conversation;
    if (isOther) this.#cut(0);
    this.#conversation = conversation;
    const { path } = conversation;
    const states = path.map((turn) => this.#stateOf(turn));
    const place = this.#place();
    const same = this.#shown.findIndex(({ turn, state }, i) => turn !== path[i] || state !== states[i]);
    this.#cut(same < 0 ? this.#shown.length : same);
    const kept = this.#shown.length;
    path.slice(kept).forEach((turn, i) => this.#add(turn, states[kept + i]));
    welcome.hidden = path.length > 0;
    if (place) this.#return(place);
    if (isOther || this.#chat.isBusy) toEnd();
  }

  /** Show more of a growing answer. */
  grow(turn) {
    const answer = this.#find(turn)?.answer;
    answer?.grow(() => this.#following(() => answer.draw()));
  }

  /** Show that an answer has ended; returns its text for those who hear it. */
  end(turn) {
    const shown = this.#find(turn);
    if (!shown) return "";
    this.#following(() => shown.answer.finish());
    shown.state = this.#stateOf(turn);
    return shown.answer.spoken;
  }

  /** Show how long growing answers have to wait. */
  tellQueue(waiting) {
    for (const { answer } of this.#shown) answer?.tellQueue(waiting);
  }

  /** Whoever sees the end goes on seeing it while `draw()` lengthens the page. */
  #following(draw) {
    const follows = isNearEnd();
    draw();
    if (follows) toEnd();
  }

  /** Where the keyboard is: in which item, and on which of its buttons. */
  #place() {
    const at = this.#shown.findIndex(({ item }) => item.contains(document.activeElement));
    return at < 0 ? null : { at, name: nameOf(document.activeElement) };
  }

  /** Put the keyboard back to where it was, in an item that may be another by now. */
  #return({ at, name }) {
    const item = this.#shown[at]?.item;
    if (!item || item.contains(document.activeElement)) return;
    const buttons = [...item.querySelectorAll("button:enabled")].filter((each) => each.checkVisibility());
    (buttons.find((each) => nameOf(each) === name) ?? buttons[0])?.focus();
  }

  #find(turn) {
    return this.#shown.find((each) => each.turn === turn);
  }

  /** What makes an item be built anew when it changes. */
  #stateOf(turn) {
    const versions = this.#conversation.versions(turn);
    const { content, reasoning, note, error, usage } = turn;
    const words = this.#chat.runOf(turn) ? ["growing"] : [note, error, usage?.total_tokens, reasoning, content];
    return [versions.indexOf(turn), versions.length, ...words].join("\n");
  }

  #cut(length) {
    for (const { item } of this.#shown.splice(length)) item.remove();
  }

  #add(turn, state) {
    const versions = this.#conversation.versions(turn);
    if (turn.role === "user") this.#append(turn, state, question(turn, versions, this.#actions));
    else {
      const answer = new Answer(turn, versions, this.#actions, this.#chat.runOf(turn));
      this.#append(turn, state, answer.item, answer);
    }
  }

  #append(turn, state, item, answer = null) {
    list.append(item);
    this.#shown.push({ turn, state, item, answer });
  }
}

const nameOf = (button) => button.ariaLabel ?? button.textContent;
