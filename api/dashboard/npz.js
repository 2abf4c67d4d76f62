// Arrays of numpy's .npz: a zip of .npy files, stored or deflated.

const END = 0x06054b50;
const ENTRY = 0x02014b50;

/** The arrays of an .npz by name: {shape, data}, data a typed array, or strings. Throws for what it cannot read. */
export async function arrays(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== END) end -= 1;
  if (end < 0) throw new Error("this is no .npz file");
  const found = {};
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left -= 1) {
    if (view.getUint32(at, true) !== ENTRY) throw new Error("this .npz file is damaged");
    const method = view.getUint16(at + 10, true);
    const size = view.getUint32(at + 20, true);
    const nameLength = view.getUint16(at + 28, true);
    const local = view.getUint32(at + 42, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, at + 46, nameLength));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const content = new Uint8Array(buffer, start, size);
    found[name.replace(/\.npy$/, "")] = array(await inflated(content, method));
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return found;
}

async function inflated(content, method) {
  if (method === 0) return content.slice().buffer;
  if (method !== 8) throw new Error(`this .npz file is compressed by method ${method}, which is not known here`);
  return new Response(new Blob([content]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).arrayBuffer();
}

const KINDS = { "<f4": Float32Array, "<f8": Float64Array, "|u1": Uint8Array, "<i4": Int32Array };

function array(buffer) {
  const view = new DataView(buffer);
  const isFirst = view.getUint8(6) === 1; // the version says how long the header's length is
  const start = isFirst ? 10 : 12;
  const length = isFirst ? view.getUint16(8, true) : view.getUint32(8, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, start, length));
  const kind = /'descr': '([^']+)'/.exec(header)[1];
  const shape = /'shape': \(([^)]*)\)/.exec(header)[1].split(",").filter((part) => part.trim()).map(Number);
  if (header.includes("'fortran_order': True")) throw new Error("arrays in Fortran's order are not read here");
  const content = buffer.slice(start + length);
  if (/^<U\d+$/.test(kind)) return { shape, data: strings(content, Number(kind.slice(2))) };
  if (!KINDS[kind]) throw new Error(`arrays of ${kind} are not read here`);
  return { shape, data: new KINDS[kind](content) };
}

function strings(content, width) {
  const codes = new Uint32Array(content);
  const found = [];
  for (let start = 0; start < codes.length; start += width) {
    const text = String.fromCodePoint(...codes.subarray(start, start + width));
    found.push(text.replace(/\0+$/, ""));
  }
  return found;
}
