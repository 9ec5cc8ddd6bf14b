// The page: puts its parts together.

import { Chat } from "./chat.js";
import { Composer, forgetDraft } from "./composer.js";
import { Connection } from "./connection.js";
import { Library } from "./library.js";
import { Messages } from "./messages.js";
import { MACHINE, Machine } from "./machine.js";
import { hide, say } from "./notices.js";
import * as settings from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { showStrip } from "./strip.js";

const [modelLine, strip, list, announcer] = ["#model", "#strip", "#messages", "#announcer"].map((selector) =>
  document.querySelector(selector),
);
const PHASES = {
  connecting: "connecting…",
  loading: "loading the model…",
  locked: "needs an API key",
  failing: "the server's last step failed",
  lost: "the server does not answer; trying again…",
  dead: "the server's engine has ended; it must be restarted",
};

let trouble = "";
const library = await Library.open();
const connection = new Connection(settings.apiKey);
const chat = new Chat(library, {
  onShow() {
    messages.show();
    sidebar.show();
    showFigures();
    const { id, path, name } = chat.conversation;
    document.title = path.length > 0 ? `${name} – Loci` : "Loci";
    // The address names the conversation, so that a reload or a bookmark finds it.
    if (path.length > 0 && location.hash !== `#${id}` && !machine.isShown) {
      history.pushState(null, "", `#${id}`);
      composer.adopt(id);
    }
  },
  onGrow: (turn) => messages.grow(turn),
  onEnd(turn) {
    announcer.textContent = messages.end(turn);
    showFigures();
  },
  onBusy() {
    composer.setBusy(chat.isBusy);
    list.classList.toggle("busy", chat.isBusy);
    if (chat.isBusy) announcer.textContent = "Answering";
    watchClosely();
    sidebar.show();
    composer.focusIfLost();
  },
  onRefused: () => connection.look(),
  onTrouble(text) {
    if (text !== trouble) say(text); // once, not at every change
    trouble = text;
  },
});
const machine = new Machine(connection, settings.apiKey);
const messages = new Messages(chat, {
  rephrase: (turn, text) => isSendable() && chat.rephrase(turn, text),
  reword: (turn, text) => chat.reword(turn, text),
  repeat: (turn) => chat.repeat(turn),
  resume: (turn) => chat.resume(turn),
  choose: (turn) => chat.choose(turn),
  remove(turn) {
    const more = chat.conversation.versions(turn).length > 1 && chat.conversation.hasMoreAfter(turn);
    say(more ? "This version and what was said after it are deleted." : "The message is deleted.", chat.remove(turn));
    composer.focusIfLost();
  },
});
const composer = new Composer((text, files) => {
  if (!isSendable()) return false;
  chat.say(text, files);
  return true;
});
const sidebar = new Sidebar(library, chat, {
  open(id) {
    go(`#${id}`);
    sidebar.leave();
    composer.focus();
  },
  async remove(id, name) {
    const undo = await chat.delete(id);
    forgetDraft(id);
    if (location.hash === `#${id}`) go("", true);
    say(`“${name}” is deleted.`, async () => {
      await undo();
      go(`#${id}`);
    });
  },
});

/** True where the server can be asked; otherwise tells why not. */
function isSendable() {
  hide();
  if (connection.isOpen) return true;
  connection.look();
  if (connection.phase === "locked") askForKey();
  else say(`Not sent: ${modelLine.textContent}`);
  return false;
}

/** Where an answer grows or the machine is watched, the server is looked at each second. */
function watchClosely() {
  connection.setBusy(chat.isAnyBusy || machine.isShown);
}

/** Show the conversation that the address names, or the machine. */
async function follow() {
  const id = location.hash.slice(1);
  const wasShown = machine.isShown;
  machine.toggle(id === MACHINE);
  if (wasShown !== machine.isShown) watchClosely();
  if (machine.isShown) {
    document.title = "Machine – Loci";
    return;
  }
  if (id) await chat.open(id);
  else chat.begin();
  composer.turnTo(chat.conversation.path.length > 0 ? chat.conversation.id : null);
}

function go(hash, isInstead = false) {
  const address = `${location.pathname}${location.search}${hash}`;
  if (isInstead) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  return follow();
}

let askedWith = null; // the key that was refused when the dialog opened by itself

function askForKey() {
  askedWith = settings.apiKey();
  const why = askedWith ? "The server does not accept this API key." : "This server requires an API key.";
  settings.open(why, "api_key");
}

function showFigures() {
  const served = connection.models.find((each) => each.id === settings.model());
  const room = served?.max_model_len ?? 0;
  showStrip(strip, connection, chat.usedTokens, room);
  messages.tellQueue(connection.now?.sum("loci_sequences_waiting") ?? 0);
}

connection.onLook(() => {
  const { phase, problem, models } = connection;
  if (connection.isOpen) settings.offerModels(models);
  modelLine.className = phase;
  modelLine.textContent = phase === "ready" ? settings.model() : PHASES[phase];
  modelLine.title = problem;
  showFigures();
  machine.refresh();
  // Once for each key; whoever closes the dialog is left alone until they send something.
  if (phase === "locked" && askedWith !== settings.apiKey()) askForKey();
});
library.onChange((id) => {
  sidebar.show();
  if (id) chat.refresh(id);
});
settings.onSave(() => connection.look());
document.querySelector("#stop").addEventListener("click", () => chat.stop());
document.querySelector("#toggle-machine").addEventListener("click", () => {
  const { id, path } = chat.conversation;
  go(machine.isShown ? (path.length > 0 ? `#${id}` : "") : `#${MACHINE}`);
});
document.querySelector("#new").addEventListener("click", () => {
  go("");
  sidebar.leave();
  composer.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
});
addEventListener("popstate", follow);

if (!library.isKept) say("This browser does not let pages keep anything: conversations end when the page is closed.");
await follow();
connection.watch();
