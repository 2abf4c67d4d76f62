// Elements of the page, made by code: what comes from the service is text, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (functions are listeners, as onclick; null and false are left out) and children. */
export function element(name, attributes = {}, ...children) {
  return furnished(document.createElement(name), attributes, children);
}

/** The same of an SVG. */
export function svg(name, attributes = {}, ...children) {
  return furnished(document.createElementNS(SVG, name), attributes, children);
}

function furnished(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** Replaces what `parent` holds; the focus stays on the element of the same id. */
export function fill(parent, ...children) {
  const focused = parent.contains(document.activeElement) ? document.activeElement.id : "";
  parent.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  if (focused) document.getElementById(focused)?.focus();
}

/** A labelled field: label, control, and a hint where there is one. `control` needs an id. */
export function field(label, control, hint = "") {
  const described = hint ? element("small", { id: `${control.id}-hint` }, hint) : null;
  if (described) control.setAttribute("aria-describedby", described.id);
  return element("div", { class: "field" }, element("label", { for: control.id }, label), control, described);
}

/** A select of [value, text] pairs. */
export function choice(id, options, chosen = "", attributes = {}) {
  const items = options.map(([value, text]) => element("option", { value, selected: value === chosen }, text));
  return element("select", { id, ...attributes }, items);
}

/** Terms with their values, without those that have none. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== false);
  return element("dl", { class: "facts" }, known.map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value))));
}

/** A file input inside a place that files can be dropped on, too; `onfiles` is called with an array of them. */
export function fileDrop(id, label, hint, accept, onfiles) {
  const input = element("input", {
    id, type: "file", multiple: true, accept, "aria-describedby": `${id}-hint`,
    onchange: () => { onfiles([...input.files]); input.value = ""; },
  });
  const place = element("div", {
    class: "drop",
    ondragover: (event) => { event.preventDefault(); place.classList.add("over"); },
    ondragleave: () => place.classList.remove("over"),
    ondrop: (event) => {
      event.preventDefault();
      place.classList.remove("over");
      if (event.dataTransfer.files.length) onfiles([...event.dataTransfer.files]);
    },
  }, element("label", { for: id }, label), input, element("small", { id: `${id}-hint` }, hint));
  return place;
}

/** Says an error where it happened: a problem's detail, or what went wrong on the way. */
export function showError(place, error) {
  if (error?.name === "AbortError") return;
  place.replaceChildren(element("p", { class: "error", role: "alert" }, error.message || String(error)));
}

/** Tells those who do not see the page. */
export function announce(text) {
  document.getElementById("announcements").textContent = text;
}
