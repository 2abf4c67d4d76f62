// Figures in words: numbers, bytes, times.

/** A number with so many digits behind the point, or a dash. */
export function decimal(value, digits = 3) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

/** A number as short as it can be read: for curves. */
export function brief(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(4);
}

export function count(value) {
  return Number.isFinite(value) ? value.toLocaleString("en") : "–";
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${(seconds / 86400).toFixed(1)} days`;
}

/** Unix seconds as this place's date and time. */
export function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/** Unix seconds as the time of day. */
export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

/** When a job will have finished, or empty. */
export function finish(job) {
  const at = job.progress?.estimated_finish_at;
  return at && !job.finished_at ? `about ${duration(at - Date.now() / 1000)} left` : "";
}

/** An id short enough to be read. */
export function short(id) {
  return id.length > 14 ? `${id.slice(0, 12)}…` : id;
}
