// Conversations as files: one as Markdown, to read; all as JSON, to keep or to bring to another browser.

import { Conversation, asMarkdown } from "./conversation.js";
import { download } from "./files.js";
import { say } from "./notices.js";

/** Give a person one conversation. */
export function exportOne(conversation) {
  download(`${conversation.name}.md`, asMarkdown(conversation), "text/markdown");
}

/** Give a person all of them. */
export async function exportAll(library) {
  download("conversations.json", JSON.stringify(await library.all(), null, 1), "application/json");
}

/** Take in what `exportAll` wrote. Of a conversation that is here already, the version changed last stays. */
export async function importAll(library, file) {
  const known = new Map(library.summaries.map(({ id, changed }) => [id, changed]));
  try {
    const records = JSON.parse(await file.text());
    if (!Array.isArray(records)) throw new TypeError("it is no list");
    const conversations = records.map(checked).filter(({ id, changed }) => changed > (known.get(id) ?? -1));
    for (const each of conversations) await library.put(each);
    say(`${conversations.length} of ${records.length} conversations are new and were imported.`);
  } catch (error) {
    say(`${file.name} cannot be imported: ${error.message}.`);
  }
}

/** A conversation made of a record from a file. Throws TypeError where that does not describe one. */
function checked(record) {
  const { id, title, changed, turns, chosen } = record ?? {};
  const isGood = /^[0-9a-f]{24}$/.test(id) && isText(title) && Number.isFinite(changed) && Array.isArray(turns)
    && chosen !== null && typeof chosen === "object" && Object.values(chosen).every(isText);
  if (!isGood) throw new TypeError("it holds something that is no conversation");
  const known = new Set([""]);
  for (const turn of turns) {
    // Parents come first, so a path always ends.
    if (!isTurn(turn) || !known.has(turn.parent)) throw new TypeError("a conversation in it is damaged");
    known.add(turn.id);
  }
  return new Conversation({ id, title, changed, turns, chosen });
}

function isTurn(turn) {
  const { id, role, content, files = [], usage = null } = turn ?? {};
  const isFile = (file) => isText(file?.name) && isText(file.text);
  const isCounted = usage === null || [usage.prompt_tokens, usage.completion_tokens].every(Number.isFinite);
  return isText(id) && isText(content) && (role === "user" || role === "assistant") && isCounted
    && Array.isArray(files) && files.every(isFile)
    && ["reasoning", "note", "error"].every((name) => turn[name] === undefined || isText(turn[name]))
    && ["firstMs", "ms"].every((name) => turn[name] === undefined || Number.isFinite(turn[name]));
}

const isText = (value) => typeof value === "string";
