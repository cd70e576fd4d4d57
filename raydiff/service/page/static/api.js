/** What the page asks of the service. Addresses are relative to the page; the key is kept in memory only. */

const TIMEOUT_MS = 60_000;
const MAX_TRIES = 5;

let key = "";

/** Send this API key from now on; empty for none. */
export function useKey(value) {
  key = value;
}

/** An answer that is none, with what to do: the problem details of the service (RFC 9457), or the page's own. */
export class Problem extends Error {
  constructor(title, detail, status = 0, retryAfter = null) {
    super(detail);
    Object.assign(this, { title, detail, status, retryAfter });
  }
}

/** The live artefact. */
export const model = () => ask("v1/model");

/** Live scores against calibration. */
export const drift = () => ask("v1/drift");

/** Another target rate, as a share; null for the artefact's own. */
export function setRate(targetFpr) {
  const body = JSON.stringify({ target_fpr: targetFpr });
  return ask("v1/threshold", { method: "PUT", body, type: "application/json" });
}

/** The verdict on a file with its reasons; where the service is full it waits as long as it is told, and says so. */
export async function score(file, maxBytes, onwait) {
  await check(file, maxBytes);
  for (let tries = 1; ; tries += 1) {
    try {
      return await ask("v1/score?explain=true", { method: "POST", body: file, type: "application/octet-stream" });
    } catch (problem) {
      if (problem.status !== 503 || problem.retryAfter === null || tries === MAX_TRIES) throw problem;
      onwait(problem.retryAfter);
      await new Promise((done) => setTimeout(done, 1000 * problem.retryAfter));
    }
  }
}

/** What a service could only answer by closing the connection, and a browser would call a fault of the network. */
async function check(file, maxBytes) {
  if (file.size > maxBytes) {
    const sizes = `It has ${file.size} bytes, and at most ${maxBytes} are taken`;
    throw new Problem("The image has too many bytes", `${sizes}; send a smaller one.`);
  }
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Problem("The file cannot be read", "It is a folder, or was moved or changed; choose the image again.");
  }
}

async function ask(path, { method = "GET", body, type } = {}) {
  const headers = { Accept: "application/json" };
  if (type) headers["Content-Type"] = type;
  if (key) headers["X-API-Key"] = key;
  let response;
  try {
    const signal = AbortSignal.timeout(TIMEOUT_MS);
    response = await fetch(new URL(path, document.baseURI), { method, body, headers, signal, cache: "no-store" });
    if (response.ok) return await response.json();
  } catch (error) {
    throw unanswered(error);
  }
  throw await refusal(response);
}

function unanswered(error) {
  if (error.name === "TimeoutError") {
    return new Problem("No answer in time", `Nothing came within ${TIMEOUT_MS / 1000} s; try again later.`);
  }
  if (error instanceof SyntaxError) {
    return new Problem("No answer that can be read", "What came is not JSON; is there another server in between?");
  }
  return new Problem("The service cannot be reached", "See whether it runs and this device is online, and try again.");
}

async function refusal(response) {
  const found = await response.json().catch(() => ({}));
  const title = typeof found.title === "string" ? found.title : `The service answered ${response.status}`;
  const detail = typeof found.detail === "string" ? found.detail : response.statusText || "It gave no reason.";
  const seconds = Number(response.headers.get("Retry-After") ?? Number.NaN);
  const retryAfter = Number.isFinite(seconds) ? Math.min(Math.max(seconds, 0.2), 10) : null;
  return new Problem(title, detail, response.status, retryAfter);
}
