// One model: its image with the patches, its prediction, and its maps.

import * as api from "./api.js";
import { PatchGrid } from "./grid.js";
import { describeField, describeRow, draw, largest, short, sum } from "./maps.js";

const LISTED = 10;
const MERGED = "all routes";
const FIELD = "receptive field";

/** Does one piece of work at a time; of what is asked for meanwhile, only the last. */
class Newest {
  constructor(work, onError) {
    Object.assign(this, { work, onError, busy: false, next: null });
  }

  async ask(argument) {
    this.next = argument;
    if (this.busy) {
      return;
    }
    this.busy = true;
    while (this.next !== null) {
      const argument = this.next;
      this.next = null;
      try {
        await this.work(argument);
      } catch (error) {
        this.onError(error);
      }
    }
    this.busy = false;
  }
}

const fromTemplate = (name) => document.getElementById(name).content.firstElementChild.cloneNode(true);

/** A figure with a map, its description and its largest values. */
class MapFigure {
  constructor(title) {
    this.element = fromTemplate("map");
    this.canvas = this.element.querySelector("canvas");
    this.image = this.element.querySelector("img");
    this.title = title;
    this.element.querySelector("h3").textContent = title;
    this.list = this.element.querySelector("details");
    this.list.addEventListener("toggle", () => this.#fillList());
  }

  show({ values, height, width }, words, transfer) {
    draw(this.canvas, values, height, width, transfer);
    this.element.querySelector("p").textContent = words;
    this.canvas.ariaLabel = `${this.title}: ${words}`;
    this.words = words;
    this.#fillList();
  }

  #fillList() {
    if (!this.list.open) {
      return;
    }
    const items = largest(this.canvas.values, this.canvas.width, LISTED).map(({ row, column, value }) => {
      const item = document.createElement("li");
      item.textContent = `row ${row}, column ${column}: ${short(value)}`;
      return item;
    });
    this.list.querySelector("ol").replaceChildren(...items);
  }
}

export class ModelView {
  /**
   * @param number Of the model.
   * @param model What the explorer says of it.
   * @param handlers onPoint(place or null), onChoose(place), onBlock(number, name), onError(error).
   */
  constructor(number, model, handlers) {
    Object.assign(this, { number, model, handlers, figures: new Map() });
    this.element = fromTemplate("model");
    const title = this.element.querySelector("h2");
    title.textContent = model.name;
    title.id = `model-${number}`;
    this.element.setAttribute("aria-labelledby", title.id);
    this.maps = this.element.querySelector(".maps");
    this.image = this.element.querySelector("img");
    this.grid = new PatchGrid(this.element.querySelector(".patches"), handlers.onPoint, handlers.onChoose);
    this.rows = new Newest((query) => this.#loadRow(query), handlers.onError);
    this.fields = new Newest((query) => this.#loadField(query), handlers.onError);
    this.predictions = new Newest(
      async (query) => this.#showPrediction(await api.prediction(query)),
      (error) => this.#showPrediction({ text: error.message }),
    );
    this.select = this.element.querySelector("select");
    for (const { name, height, width } of model.blocks) {
      this.select.add(new Option(`${name} (${height} × ${width})`, name));
    }
    this.select.addEventListener("change", () => handlers.onBlock(number, this.select.value));
  }

  /** The block of this name, or the paper's: the second one of the third stage, or the last there is. */
  block(name) {
    const blocks = this.model.blocks;
    const papers = blocks.find((block) => /stages[._]2\.(blocks\.)?1(\.|$)/.test(block.name));
    return blocks.find((block) => block.name === name) ?? papers ?? blocks.at(-1);
  }

  /** Load an image. */
  async showImage(image) {
    const address = await api.picture({ model: this.number, image });
    URL.revokeObjectURL(this.image.src);
    this.image.src = address;
    for (const { image } of this.figures.values()) {
      image.src = address;
    }
  }

  /** Load what the model says of an image. */
  predict(image) {
    this.predictions.ask({ model: this.number, image });
  }

  /** Show what a place receives, and its receptive field if that is asked for. */
  show({ image, block, kind, delta, field }, place, isChosen) {
    const { name, height, width } = this.block(block);
    this.select.value = name;
    this.grid.resize(height, width);
    if (isChosen) {
      this.grid.choose(place);
    }
    const { position } = this.grid.patchAt(place);
    this.rows.ask({ model: this.number, image, block: name, position, kind, delta: Number(delta) });
    this.showsField = field;
    if (!field) {
      this.#remove(FIELD);
    } else if (isChosen) {
      this.fields.ask({ model: this.number, image, x: place.x, y: place.y });
    }
  }

  /** The merged map in words; nothing before it is shown. */
  get words() {
    const merged = this.figures.get(MERGED);
    return merged ? `${this.model.name}, ${this.where}: ${merged.words}` : "";
  }

  async #loadRow(query) {
    const { routes, height, width, maps } = await api.row(query);
    const [row, column] = [Math.floor(query.position / width) + 1, (query.position % width) + 1];
    this.where = `patch in row ${row} of ${height}, column ${column} of ${width}`;
    this.element.querySelector(".where").textContent = this.where;
    const titles = routes.map((name, index) => `route ${index + 1}: ${name.replaceAll("_", " ")}`);
    const shown = [[MERGED, sum(maps)], ...maps.map((values, index) => [titles[index], values])];
    for (const [title, values] of shown) {
      this.#figure(title).show({ values, height, width }, describeRow(values, width));
    }
    const titlesNow = [...shown.map(([title]) => title), FIELD];
    [...this.figures.keys()].filter((title) => !titlesNow.includes(title)).forEach((title) => this.#remove(title));
    this.handlers.onShown();
  }

  async #loadField(query) {
    const { values, height, width } = await api.field(query);
    if (!this.showsField) {
      return; // it was given up meanwhile
    }
    const root = (share) => share ** 0.2; // as the paper shows it
    this.#figure(FIELD).show({ values, height, width }, describeField(values, width), root);
  }

  #figure(title) {
    if (!this.figures.has(title)) {
      const figure = new MapFigure(title);
      if (this.image.src) {
        figure.image.src = this.image.src;
      }
      this.maps.insertBefore(figure.element, this.figures.get(FIELD)?.element ?? null); // which stays the last
      this.figures.set(title, figure);
    }
    return this.figures.get(title);
  }

  #remove(title) {
    this.figures.get(title)?.element.remove();
    this.figures.delete(title);
  }

  #showPrediction({ classes, text }) {
    const items = (classes ?? [{ label: text }]).map(({ label, score }) => {
      const item = document.createElement("li");
      item.append(label);
      if (score !== undefined) {
        const bar = document.createElement("progress");
        bar.value = score;
        bar.ariaHidden = "true";
        item.append(Object.assign(document.createElement("span"), { textContent: `${(100 * score).toFixed(1)} %` }), bar);
      }
      return item;
    });
    this.element.querySelector(".prediction").replaceChildren(...items);
  }
}
