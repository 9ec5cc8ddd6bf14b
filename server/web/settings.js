// What a person may set. Settings stay in this browser; the API key only in this tab.

const NAMES = ["model", "system", "temperature", "max_tokens", "reasoning_effort"];
const PLACE = "loci.settings";
const KEY_PLACE = "loci.key";

const dialog = document.querySelector("#settings");
const form = document.querySelector("#settings-form");
const note = document.querySelector("#settings-note");

let values = read();

function read() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(PLACE)) ?? {};
  } catch {
    // Damaged or blocked storage is as good as none.
  }
  const text = (name) => (typeof stored[name] === "string" ? stored[name] : "");
  return Object.fromEntries(NAMES.map((name) => [name, text(name)]));
}

/** The API key, empty where none was given. */
export const apiKey = () => sessionStorage.getItem(KEY_PLACE) ?? "";

/** The name of the chosen model. */
export const model = () => values.model;

/** The fields of a chat request that settings decide, for a conversation `[{role, content}]`. */
export function request(conversation) {
  const messages = values.system ? [{ role: "system", content: values.system }] : [];
  const body = { model: values.model, messages: [...messages, ...conversation] };
  if (values.temperature) body.temperature = Number(values.temperature);
  if (values.max_tokens) body.max_completion_tokens = Number(values.max_tokens);
  if (values.reasoning_effort) body.reasoning_effort = values.reasoning_effort;
  return body;
}

/** Offer `served` (`[{id}]`) and choose the first unless the choice of earlier is among them. */
export function offerModels(served) {
  const names = served.map((each) => each.id);
  form.model.replaceChildren(...names.map((name) => new Option(name, name)));
  if (!names.includes(values.model)) values.model = names[0];
}

/** Open the dialog, with `why` it opened by itself and the field that should be filled in. */
export function open(why = "", field = "system") {
  for (const name of NAMES) form[name].value = values[name];
  form.api_key.value = apiKey();
  note.textContent = why;
  note.hidden = !why;
  if (!dialog.open) dialog.showModal();
  form[field].focus();
}

/** Call `listener` whenever settings were saved. */
export function onSave(listener) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    values = Object.fromEntries(NAMES.map((name) => [name, form[name].value.trim()]));
    localStorage.setItem(PLACE, JSON.stringify(values));
    const key = form.api_key.value.trim();
    if (key) sessionStorage.setItem(KEY_PLACE, key);
    else sessionStorage.removeItem(KEY_PLACE);
    dialog.close();
    listener();
  });
}

document.querySelector("#open-settings").addEventListener("click", () => open());
document.querySelector("#close-settings").addEventListener("click", () => dialog.close());
