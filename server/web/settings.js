// What a person may set. Settings stay in this browser; the API key only in this tab.

const PLACE = "loci.settings";
const KEY_PLACE = "loci.key";

const lines = (text) => text.split("\n").filter(Boolean);
const isTrue = (text) => text === "true";

/** How each field of a chat request is read from the text of its input; empty ones are not sent. */
const FIELDS = {
  temperature: Number,
  top_p: Number,
  top_k: Number,
  min_p: Number,
  repetition_penalty: Number,
  frequency_penalty: Number,
  presence_penalty: Number,
  seed: Number,
  max_completion_tokens: Number,
  min_tokens: Number,
  stop: lines,
  stop_token_ids: (text) => text.split(/[\s,]+/).filter(Boolean).map(whole),
  logit_bias: (text) => Object.fromEntries(lines(text.trim()).map(bias)),
  include_stop_str_in_output: isTrue,
  ignore_eos: isTrue,
  reasoning_effort: String,
};
const NAMES = ["model", "system", ...Object.keys(FIELDS)];

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

function whole(text) {
  if (!/^\d+$/.test(text)) throw new Error(`Token ids are whole numbers, not “${text}”.`);
  return Number(text);
}

function bias(line) {
  const [, id, value] = /^\s*(\d+)\s*[:=\s]\s*([+-]?\d+(?:\.\d+)?)\s*$/.exec(line) ?? [];
  if (id === undefined) throw new Error(`A line of biases is “token id: number”, not “${line}”.`);
  return [id, Number(value)];
}

/** The API key, empty where none was given. */
export const apiKey = () => sessionStorage.getItem(KEY_PLACE) ?? "";

/** The name of the chosen model. */
export const model = () => values.model;

/** The fields of a chat request that settings decide, for `messages` `[{role, content}]`. */
export function request(messages) {
  const system = values.system ? [{ role: "system", content: values.system }] : [];
  return { model: values.model, messages: [...system, ...messages], ...sampling(values) };
}

function sampling(texts) {
  const given = Object.entries(FIELDS).filter(([name]) => texts[name] !== "");
  return Object.fromEntries(given.map(([name, parse]) => [name, parse(texts[name])]));
}

/** Offer `served` (`[{id}]`) and choose the first unless the choice of earlier is among them. */
export function offerModels(served) {
  const names = served.map((each) => each.id);
  if (names.join("\n") === [...form.model.options].map((each) => each.value).join("\n")) return;
  form.model.replaceChildren(...names.map((name) => new Option(name, name)));
  if (!names.includes(values.model)) values.model = names[0];
}

/** Open the dialog, with `why` it opened by itself and the field that should be filled in. */
export function open(why = "", field = "system") {
  for (const name of NAMES) {
    const input = form[name];
    if (input.type === "checkbox") input.checked = isTrue(values[name]);
    else input.value = values[name];
    // What was set must be seen, not folded away.
    if (values[name]) input.closest("details")?.setAttribute("open", "");
  }
  form.api_key.value = apiKey();
  explain(why);
  if (!dialog.open) dialog.showModal();
  form[field].focus();
}

function explain(why) {
  note.textContent = why;
  note.hidden = !why;
}

/** Call `listener` whenever settings were saved. */
export function onSave(listener) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = (input) => (input.type === "checkbox" ? (input.checked ? "true" : "") : input.value);
    const given = Object.fromEntries(NAMES.map((name) => [name, text(form[name])]));
    try {
      sampling(given);
    } catch (error) {
      explain(error.message);
      return;
    }
    values = given;
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
