// A job's events as they come. EventSource can send no Authorization header, so the stream is read by fetch.

import { Problem, rest, send } from "./service.js";

const TERMINAL = new Set(["succeeded", "failed", "cancelled"]);
const SILENCE_SECONDS = 40; // the service says something every 15
const LONGEST_PAUSE_SECONDS = 15;
const END = Symbol("end"); // of a job's events

export function isTerminal(status) {
  return TERMINAL.has(status);
}

/** A job's events from the first to the terminal one, across broken connections; `onstate` hears "live", or a pause. */
export async function* follow(jobId, onstate, signal) {
  let last = null;
  let failures = 0;
  while (!signal.aborted) {
    try {
      for await (const event of connection(jobId, last, onstate, signal)) {
        if (event === END) return;
        failures = 0;
        last = event.id;
        yield event;
        if (event.type === "status" && TERMINAL.has(event.data.status)) return;
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Problem && error.status < 500 && error.status !== 429) throw error;
    }
    const pause = Math.min(LONGEST_PAUSE_SECONDS, 0.5 * 2 ** failures) * (0.75 + Math.random() / 2);
    failures += 1;
    onstate(`connection lost; trying again in ${Math.ceil(pause)} s`);
    await rest(pause, signal);
  }
}

async function* connection(jobId, last, onstate, signal) {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENCE_SECONDS * 1000);
  try {
    const response = await send(`/v1/jobs/${jobId}/events`, {
      headers: { Accept: "text/event-stream", ...(last && { "Last-Event-ID": last }) },
      signal: AbortSignal.any([signal, silence.signal]),
      cache: "no-store",
    });
    if (response.status === 204) { // the job has finished, and has no more events
      yield END;
      return;
    }
    onstate("live");
    let rest = "";
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENCE_SECONDS * 1000);
      const messages = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = messages.pop();
      for (const message of messages) {
        const data = message.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    clearTimeout(timer);
    silence.abort(); // whoever ceases to read ends the request
  }
}
