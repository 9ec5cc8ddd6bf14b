// The conversations kept in this browser: in IndexedDB, where they stay until a person deletes them. Their summaries
// (`{id, name, changed, size}`) are kept beside them, so that the list need not read them all.

import { Conversation } from "./conversation.js";

const NAME = "loci";
const MOST_CHARACTERS = 64e6; // of all conversations together; browsers give a page more, but not a promise
const CHANNEL = "loci.library"; // other tabs hear here what changed

/** Why something is not kept, in words for a person. */
export class NotKept extends Error {}

/** All kept conversations. Without a database (blocked, or a private window) they last as long as the page. */
export class Library {
  #database = null;
  #summaries = new Map();
  #unkept = new Map(); // conversations, where there is no database
  #channel = new BroadcastChannel(CHANNEL);
  #listeners = [];

  /** The library as it was left. */
  static async open() {
    const library = new Library();
    try {
      library.#database = await opened();
      await library.#readSummaries();
    } catch (error) {
      console.warn("conversations cannot be kept:", error);
    }
    library.#channel.onmessage = async ({ data }) => {
      await library.#readSummaries();
      library.#tell(data);
    };
    return library;
  }

  /** False where conversations are gone with the page. */
  get isKept() {
    return this.#database !== null;
  }

  /** Summaries, those changed last first. */
  get summaries() {
    return [...this.#summaries.values()].sort((a, b) => b.changed - a.changed);
  }

  /** Call `listener(id)` whenever a conversation changed, here or (with its id) in another tab. */
  onChange(listener) {
    this.#listeners.push(listener);
  }

  /** A conversation, or null where there is none of this id. */
  async get(id) {
    const found = this.#database
      ? await promised(this.#database.transaction("conversations").objectStore("conversations").get(id))
      : this.#unkept.get(id);
    return found ? new Conversation(found) : null;
  }

  /** All conversations, for a person to take along. */
  async all() {
    return Promise.all(this.summaries.map(({ id }) => this.get(id)));
  }

  /** Keep a conversation as it is now. Throws NotKept where there is no room for it. */
  async put(conversation) {
    const record = { ...conversation };
    const size = JSON.stringify(record).length;
    const others = this.summaries.reduce((sum, each) => sum + (each.id === record.id ? 0 : each.size), 0);
    if (others + size > MOST_CHARACTERS) throw new NotKept(full(`${MOST_CHARACTERS / 1e6} MB`));
    const { id, changed, name } = conversation;
    const summary = { id, changed, name, size };
    await this.#write((conversations, summaries) => {
      conversations.put(record);
      summaries.put(summary);
    });
    if (!this.#database) this.#unkept.set(id, structuredClone(record));
    this.#summaries.set(id, summary);
    this.#announce(id);
  }

  /** Forget a conversation. */
  async delete(id) {
    await this.#write((conversations, summaries) => {
      conversations.delete(id);
      summaries.delete(id);
    });
    this.#unkept.delete(id);
    this.#summaries.delete(id);
    this.#announce(id);
  }

  /** The summaries of conversations in whose name or text all `words` occur. */
  async search(words) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for (const summary of this.summaries) {
      const { turns } = (await this.get(summary.id)) ?? { turns: [] };
      const files = turns.flatMap((turn) => turn.files ?? []).flatMap((file) => [file.name, file.text]);
      const text = [summary.name, ...turns.map((turn) => turn.content), ...files].join("\n").toLowerCase();
      if (wanted.every((word) => text.includes(word))) found.push(summary);
    }
    return found;
  }

  async #write(change) {
    if (!this.#database) return;
    const transaction = this.#database.transaction(["conversations", "summaries"], "readwrite");
    const done = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    change(transaction.objectStore("conversations"), transaction.objectStore("summaries"));
    try {
      await done;
    } catch (error) {
      throw new NotKept(error?.name === "QuotaExceededError" ? full("the browser's own limit") : unwritable(error));
    }
  }

  async #readSummaries() {
    if (!this.#database) return;
    const read = await promised(this.#database.transaction("summaries").objectStore("summaries").getAll());
    this.#summaries = new Map(read.map((each) => [each.id, each]));
  }

  #announce(id) {
    this.#channel.postMessage(id);
    this.#tell(null);
  }

  #tell(id) {
    for (const listener of this.#listeners) listener(id);
  }
}

function opened() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("conversations", { keyPath: "id" });
    request.result.createObjectStore("summaries", { keyPath: "id" });
  };
  return promised(request);
}

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const full = (limit) =>
  `There is no room to keep this conversation (${limit}). Export and delete older ones; until then this one is gone ` +
  "when the page is closed.";
const unwritable = (error) => `This browser does not keep the conversation: ${error?.message ?? "it does not say why"}.`;
