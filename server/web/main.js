// The page: puts together settings, conversation, composer and the strip of tiers.

import { models } from "./api.js";
import { Conversation } from "./conversation.js";
import { markEdited } from "./messages.js";
import * as settings from "./settings.js";
import { watchTiers } from "./strip.js";

const RETRY_MS = 2000;

const [modelLine, composer, prompt, send, stop, editing, announcer] = [
  "#model", "#composer", "#prompt", "#send", "#stop", "#editing", "#announcer",
].map((selector) => document.querySelector(selector));

let edited = null; // index of the turn that is being edited

const conversation = new Conversation({
  onBusy(isBusy) {
    send.hidden = isBusy;
    stop.hidden = !isBusy;
    tellStrip(isBusy);
    if (isBusy) announcer.textContent = "Answering";
    prompt.focus();
  },
  onSaid(text) {
    announcer.textContent = text;
  },
  onEdit(index, text) {
    if (conversation.isBusy) return;
    edit(index, text);
  },
  onKeyNeeded(why) {
    settings.open(why, "api_key");
  },
});

function edit(index, text) {
  edited = index;
  editing.hidden = index === null;
  markEdited(index);
  prompt.value = text;
  fit();
  prompt.focus();
}

/** As high as its text, within what the style sheet allows. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function submit() {
  const text = prompt.value.trim();
  if (!text || conversation.isBusy) return;
  if (!settings.model()) {
    connect();
    return;
  }
  const at = edited ?? undefined;
  edit(null, "");
  conversation.say(text, at);
}

/** Find out what is served; again until it is there. */
async function connect() {
  try {
    const served = await models(settings.apiKey());
    settings.offerModels(served);
    const chosen = served.find((each) => each.id === settings.model());
    modelLine.textContent = chosen.id;
    modelLine.title = `${chosen.max_model_len} tokens of context`;
  } catch (error) {
    modelLine.textContent = error.status === 503 ? "loading the model…" : "not connected";
    modelLine.title = error.message;
    if (error.status === 401) settings.open("This server requires an API key.", "api_key");
    else setTimeout(connect, RETRY_MS);
  }
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  // On phones the return key begins a line. While an input method composes, it belongs to it.
  const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (!sends || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (conversation.isBusy) conversation.stop();
  else if (edited !== null) edit(null, "");
});
stop.addEventListener("click", () => conversation.stop());
document.querySelector("#cancel-edit").addEventListener("click", () => edit(null, ""));
document.querySelector("#new").addEventListener("click", () => {
  conversation.clear();
  edit(null, "");
});
settings.onSave(connect);

connect();
const tellStrip = watchTiers(document.querySelector("#strip"), settings.apiKey);
