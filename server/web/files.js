// Text files that go with a question: read in the browser, and sent as part of the message.

const MOST_BYTES = 1_000_000;

/** Why a file cannot be attached, in words for a person. */
export class Unreadable extends Error {}

/** A file's `{name, text}`. Throws Unreadable where it is no text, or too much. */
export async function readText(file) {
  if (file.size > MOST_BYTES) throw new Unreadable(`${file.name} is larger than 1 MB.`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    const text = new TextDecoder(encodingOf(bytes), { fatal: true }).decode(bytes);
    if (!text.includes("\0")) return { name: file.name, text };
  } catch {
    // Said below.
  }
  throw new Unreadable(`${file.name} is no text file; the model reads only text.`);
}

/** UTF-8, unless the file begins with the mark of UTF-16. */
function encodingOf([first, second]) {
  if (first === 0xff && second === 0xfe) return "utf-16le";
  if (first === 0xfe && second === 0xff) return "utf-16be";
  return "utf-8";
}

/** Give a person `text` as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name.replace(/[^\p{L}\p{N} ._-]/gu, "").trim().slice(-80) || "conversation";
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** A size in words. */
export function sizeOf(text) {
  const count = new Blob([text]).size;
  return count < 1000 ? `${count} B` : `${Math.ceil(count / 1000)} kB`;
}
