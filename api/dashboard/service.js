// The service over HTTP: requests with the key where there is one, and problems as errors.

const KEY = "flowpp-key";

/** The key, kept in this tab's session alone. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** What the service refuses: its problem document's status, code and detail. */
export class Problem extends Error {
  constructor(status, document) {
    super(document.detail || `the service answered ${status}`);
    this.name = "Problem";
    this.status = status;
    this.code = document.code;
  }
}

function headersWith(headers = {}) {
  const token = key.get();
  return token ? { ...headers, Authorization: `Bearer ${token}` } : headers;
}

async function refusal(status, text) {
  let document = {};
  try { document = JSON.parse(text); } catch { /* not ours: a proxy's page */ }
  const problem = new Problem(status, document);
  if (status === 401) window.dispatchEvent(new CustomEvent("unauthenticated", { detail: problem }));
  return problem;
}

/** The response to a request; `path` begins with /v1. Throws `Problem`, and `Error` where nobody answers. */
export async function send(path, { headers, ...options } = {}) {
  let response;
  try {
    response = await fetch(path.slice(1), { ...options, headers: headersWith(headers), credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the service does not answer");
  }
  if (!response.ok) throw await refusal(response.status, await response.text());
  return response;
}

export async function get(path, signal) {
  return (await send(path, { signal })).json();
}

/** POSTs JSON, a form, or nothing. */
export async function post(path, body, { signal, headers = {} } = {}) {
  const isForm = body instanceof FormData;
  const sent = body === undefined || isForm ? body : JSON.stringify(body);
  const type = body === undefined || isForm ? {} : { "Content-Type": "application/json" };
  return (await send(path, { method: "POST", body: sent, headers: { ...headers, ...type }, signal })).json();
}

/** The objects of a list, page after page, up to `most`. */
export async function all(path, signal, most = 500) {
  const found = [];
  let page = { has_more: true };
  while (page.has_more && found.length < most) {
    const query = new URLSearchParams({ limit: "100", ...(page.last_id && { after: page.last_id }) });
    page = await get(`${path}${path.includes("?") ? "&" : "?"}${query}`, signal);
    found.push(...page.data);
  }
  return found;
}

/** POSTs a form and tells how much of it is sent, from 0 to 1: fetch cannot. */
export function upload(path, form, onprogress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path.slice(1));
    for (const [name, value] of Object.entries(headersWith())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", (event) => event.lengthComputable && onprogress(event.loaded / event.total));
    request.addEventListener("load", async () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(await refusal(request.status, request.responseText));
    });
    request.addEventListener("error", () => reject(new Error("the upload broke off; the service does not answer")));
    request.addEventListener("abort", () => reject(new DOMException("left", "AbortError")));
    signal?.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

/** An image that only those with the key may see, as an element. */
export async function picture(path, alt, signal) {
  const address = URL.createObjectURL(await (await send(path, { signal })).blob());
  const image = new Image();
  image.alt = alt;
  image.src = address;
  try { await image.decode(); } finally { URL.revokeObjectURL(address); }
  return image;
}

const LARGE = 2 ** 28;

/** Saves a file on the reader's disk, large ones without holding them where the browser can. The key is in no URL. */
export async function download(path, name, size = 0) {
  if (!key.get()) return follow(path.slice(1), name);
  if (size > LARGE && window.showSaveFilePicker) {
    const file = await window.showSaveFilePicker({ suggestedName: name });
    const response = await send(path);
    return response.body.pipeTo(await file.createWritable());
  }
  const address = URL.createObjectURL(await (await send(path)).blob());
  follow(address, name);
  setTimeout(() => URL.revokeObjectURL(address), 60_000); // the browser reads it after the click
}

function follow(address, name) {
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
}

/** Calls `action` now and then every so many seconds, while the page is seen, until `signal`. */
export async function every(seconds, action, signal) {
  while (!signal.aborted) {
    if (!document.hidden) await action();
    await rest(seconds, signal);
  }
}

export function rest(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}
