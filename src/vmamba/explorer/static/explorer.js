// The page: choices, models side by side, and the address, which holds what is shown.

import * as api from "./api.js";
import { ModelView } from "./view.js";

const byId = (id) => document.getElementById(id);
const tell = (message) => (byId("message").textContent = message);
const tellError = (error) => {
  tell(error.message);
  if (!(error instanceof api.Refusal)) {
    console.error(error);
  }
};

const explorer = await api.state();
const choice = { image: "", blocks: [], kind: "CwBw", delta: false, over: false, field: false, place: { x: 0.5, y: 0.5 } };
let shownImage = null;
let telling;

/** Take the choice from the address; what it does not say stays as it is. */
function readAddress() {
  const values = new URLSearchParams(location.hash.slice(1));
  const isFraction = (value) => Number.isFinite(value) && value >= 0 && value < 1;
  choice.image = values.get("image") ?? choice.image;
  choice.blocks = values.has("block") ? values.getAll("block") : choice.blocks;
  choice.kind = explorer.kinds.find(({ name }) => name === values.get("map"))?.name ?? choice.kind;
  for (const name of ["delta", "over", "field"]) {
    choice[name] = values.has(name) ? values.get(name) === "1" : choice[name];
  }
  const [x, y] = (values.get("at") ?? "").split(",").map(Number.parseFloat);
  if (isFraction(x) && isFraction(y)) {
    choice.place = { x, y };
  }
}

function writeAddress() {
  const { image, kind, place } = choice;
  const values = new URLSearchParams({ image, map: kind, at: `${place.x.toFixed(5)},${place.y.toFixed(5)}` });
  choice.blocks.forEach((block) => values.append("block", block));
  for (const name of ["delta", "over", "field"]) {
    if (choice[name]) {
      values.set(name, "1");
    }
  }
  history.replaceState(null, "", `#${values}`);
}

function fillForm() {
  byId("image").replaceChildren(...explorer.images.map(({ id, name }) => new Option(name, id)));
  byId("image").value = choice.image;
  for (const name of ["delta", "over", "field"]) {
    byId(name).checked = choice[name];
  }
  document.querySelector(`input[value="${choice.kind}"]`).checked = true;
  document.body.classList.toggle("over", choice.over);
}

/** Show the maps of a place; the chosen one is kept in the address. */
function show(place = choice.place) {
  if (shownImage === null) {
    return;
  }
  views.forEach((view, number) =>
    view.show({ ...choice, image: shownImage, block: choice.blocks[number] }, place, place === choice.place),
  );
}

/** Show what the choice says, an image that is new to the page included. */
async function update() {
  fillForm();
  writeAddress();
  if (choice.image === "") {
    tell("Drop an image onto the page, or add one above.");
    return;
  }
  if (choice.image !== shownImage) {
    const image = choice.image;
    try {
      await Promise.all(views.map((view) => view.showImage(image)));
    } catch (error) {
      tellError(error);
      return;
    }
    if (image !== choice.image) {
      return; // another was chosen meanwhile
    }
    shownImage = image;
    tell("");
    show();
    views.forEach((view) => view.predict(image));
    return;
  }
  tell("");
  show();
}

async function add(file) {
  if (!file) {
    return;
  }
  if (file.size > explorer.most_bytes) {
    const [size, most] = [file.size, explorer.most_bytes].map((bytes) => (bytes / 2 ** 20).toFixed(1));
    tell(`${file.name}: ${size} MiB, and at most ${most} MiB are taken`);
    return;
  }
  try {
    const image = await api.upload(file);
    if (!explorer.images.some(({ id }) => id === image.id)) {
      explorer.images.push(image);
    }
    choice.image = image.id;
    await update();
  } catch (error) {
    tellError(error);
  }
}

const handlers = {
  onPoint: (place) => show(place ?? choice.place),
  onChoose(place) {
    choice.place = place;
    writeAddress();
    show();
  },
  onBlock(number, name) {
    choice.blocks = views.map((view, index) =>
      index === number || view.block(name).name === name ? name : choice.blocks[index],
    );
    update();
  },
  onError: tellError,
  /** Tell who listens, once the maps stand still. */
  onShown() {
    clearTimeout(telling);
    telling = setTimeout(() => {
      byId("told").textContent = views.map((view) => view.words).filter(Boolean).join(". ");
    }, 500);
  },
};

for (const { name, meaning } of explorer.kinds) {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "kind", value: name });
  input.addEventListener("change", () => {
    choice.kind = name;
    update();
  });
  label.append(input, ` ${meaning}`);
  byId("kinds").append(label);
}
for (const name of ["delta", "over", "field"]) {
  byId(name).addEventListener("change", (event) => {
    choice[name] = event.target.checked;
    update();
  });
}
byId("image").addEventListener("change", (event) => {
  choice.image = event.target.value;
  update();
});
byId("file").addEventListener("change", async (event) => {
  await add(event.target.files[0]);
  event.target.value = ""; // so that the same file can be added again
});
byId("choice").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragged");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dragged"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragged");
  add(event.dataTransfer.files[0]);
});
window.addEventListener("hashchange", () => {
  readAddress();
  update();
});

const views = explorer.models.map((model, number) => new ModelView(number, model, handlers));
byId("models").replaceChildren(...views.map((view) => view.element));
choice.image = explorer.images[0]?.id ?? "";
choice.blocks = views.map((view) => view.block().name);
readAddress();
await update();
