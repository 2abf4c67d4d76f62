// The page's frame: which page is shown by what the address says behind #, and who is asked for a key.

import * as checkpoints from "./checkpoints.js";
import * as dataset from "./dataset.js";
import * as datasets from "./datasets.js";
import { element, showError } from "./elements.js";
import * as job from "./job.js";
import * as jobs from "./jobs.js";
import * as sample from "./sample.js";
import * as score from "./score.js";
import { get, key } from "./service.js";

// Each page: show(main, {id, query, signal}) fills `main`, and stops what it does upon `signal`.
const PAGES = { jobs, datasets, checkpoints, score, sample };
const OBJECTS = { jobs: job, datasets: dataset };

const main = document.getElementById("main");
let leaving = new AbortController();

function address() {
  const [path, query] = location.hash.slice(2).split("?");
  const [name, id] = path.split("/").map(decodeURIComponent);
  return { name: Object.hasOwn(PAGES, name) ? name : "jobs", id, query: new URLSearchParams(query) };
}

async function show(isFirst = false) {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { name, id, query } = address();
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.getElementById("forget-key").hidden = !key.get();
  const page = id && OBJECTS[name] ? OBJECTS[name] : PAGES[name];
  const heading = element("h1", { tabindex: -1 }, page.title);
  const body = element("div", { class: "page" });
  main.replaceChildren(heading, body);
  document.title = `${page.title} – flowpp`;
  if (!isFirst) heading.focus(); // a reader of the screen hears where they are
  try {
    await page.show(body, { id, query, signal });
  } catch (error) {
    if (signal.aborted) return;
    showError(body, error);
    if (error.status === 401) body.append(element("p", { class: "buttons" }, element("button", { type: "button", onclick: () => dialog.showModal() }, "Enter a key")));
  }
}

const dialog = document.getElementById("key-dialog");
const form = document.getElementById("key-form");
const typed = document.getElementById("key");
const fault = document.getElementById("key-error");

window.addEventListener("unauthenticated", ({ detail }) => {
  if (key.get()) say(detail.message); // it is known no more
  key.forget();
  document.getElementById("forget-key").hidden = true;
  if (!dialog.open) dialog.showModal();
});

function say(text) {
  fault.textContent = text;
  fault.hidden = !text;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  say("");
  key.set(typed.value.trim());
  try {
    await get("/v1/jobs?limit=1");
  } catch (error) {
    key.forget();
    say(error.message);
    return;
  }
  form.reset();
  dialog.close();
  show();
});

document.getElementById("forget-key").addEventListener("click", () => {
  key.forget();
  show();
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // what stands behind # is the page
  main.focus();
});

window.addEventListener("hashchange", () => show());
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault()); // beside a drop place
show(true);
