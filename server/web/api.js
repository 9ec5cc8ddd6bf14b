// The server's interface as this page uses it. Paths are relative, so the page also works behind a prefix.

const LOST = "The connection was lost before the answer was complete. What has arrived is above.";

/** An answer that is an error: what the server said, and its HTTP status (0: it could not be reached). */
export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Fetch with the API key; throws ServerError for anything but success. */
async function ask(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached.");
  }
  if (!response.ok) throw new ServerError(response.status, await complaint(response));
  return response;
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

/** The models served: `[{id, max_model_len}]`. */
export async function models(key) {
  return (await (await ask("v1/models", key)).json()).data;
}

/** The page of metrics, as text. */
export async function metrics(key) {
  return (await ask("metrics", key)).text();
}

/** Where each expert is and how often it was used: `{tiers, layers: [{layer, experts, uses}]}`. */
export async function tiers(key) {
  return (await ask("tiers", key)).json();
}

/** How the server is: "ok", "failing" (its last step failed) or "dead" (its engine has ended). */
export async function health() {
  try {
    return (await (await ask("health", "")).json()).status;
  } catch (error) {
    if (error.status === 503) return "dead";
    throw error;
  }
}

/**
 * Streams an answer: yields `{reasoning, content, finish, usage, progress}`, each of them only where the server sent
 * it; `progress` is `{total, cache, processed, time_ms}`, tokens of the prompt. Throws what `fetch` throws when
 * `signal` aborts, and ServerError where the server refuses, fails on the way or is gone.
 */
export async function* chat(body, key, signal) {
  const response = await ask("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body, stream: true, stream_options: { include_usage: true }, return_progress: true,
    }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(500, chunk.error.message);
    const choice = chunk.choices?.[0];
    yield {
      reasoning: choice?.delta?.reasoning_content,
      content: choice?.delta?.content,
      finish: choice?.finish_reason,
      usage: chunk.usage,
      progress: chunk.prompt_progress,
    };
  }
  throw new ServerError(0, LOST);
}

/** The data of server-sent events, one string each. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await read(reader);
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice("data:".length).trimStart()).join("\n");
    }
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, LOST); // browsers call it a network error, or nothing at all
  }
}
