// What the page asks the explorer, which runs on this machine.

/** A question that was refused; the message says why. */
export class Refusal extends Error {}

async function ask(path, query = {}, options = {}) {
  let response;
  try {
    response = await fetch(`${path}?${new URLSearchParams(query)}`, options);
  } catch {
    throw new Refusal("The explorer does not answer; start it again with vmamba explore.");
  }
  if (!response.ok) {
    throw new Refusal((await response.json()).error);
  }
  return response;
}

/** Models, images and kinds of maps. */
export const state = async () => (await ask("/api/state")).json();

/** The image as a model sees it: an address of the picture in this page. */
export const picture = async (query) => URL.createObjectURL(await (await ask("/api/picture", query)).blob());

/** {classes: [{label, score}]} or {text}. */
export const prediction = async (query) => (await ask("/api/prediction", query)).json();

/** What a patch receives: {routes, height, width, maps}, NaN where a route has not been yet. */
export async function row(query) {
  const response = await ask("/api/row", query);
  const [number, height, width] = shape(response);
  const values = new Float32Array(await response.arrayBuffer());
  const size = height * width;
  const maps = Array.from({ length: number }, (_, index) => values.subarray(index * size, (index + 1) * size));
  const routes = response.headers.get("X-Routes").split(",").map(decodeURIComponent);
  return { routes, height, width, maps };
}

/** How strongly each pixel moves a patch of the last feature map: {height, width, values}. */
export async function field(query) {
  const response = await ask("/api/field", query);
  const [height, width] = shape(response);
  return { height, width, values: new Float32Array(await response.arrayBuffer()) };
}

/** Give the explorer an image: {id, name}. */
export async function upload(file) {
  const options = { method: "POST", body: file, headers: { "X-Name": encodeURIComponent(file.name) } };
  return (await ask("/api/images", {}, options)).json();
}

const shape = (response) => response.headers.get("X-Shape").split(",").map(Number);
