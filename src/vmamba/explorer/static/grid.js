// The patches of an image: a grid for the pointer, the keyboard and screen readers.

const MOST_CELLS = 64; // along a side; of finer feature maps a cell stands for several patches

export class PatchGrid {
  /**
   * @param element Lies over the image.
   * @param onPoint Called with the place (x, y), each in [0, 1), that the pointer is at, or null when it leaves.
   * @param onChoose Called with the place of a cell that was clicked or reached by the keyboard.
   */
  constructor(element, onPoint, onChoose) {
    this.element = element;
    this.cells = [];
    element.addEventListener("pointermove", (event) => this.#point(this.#cellOf(event), onPoint));
    element.addEventListener("pointerleave", () => this.#point(null, onPoint));
    element.addEventListener("keydown", (event) => this.#move(event));
    element.addEventListener("focusin", (event) => {
      const cell = this.#cellOf(event);
      if (cell && cell !== this.chosen) {
        onChoose(this.#placeOf(cell));
      }
    });
  }

  /** Make cells for a feature map. */
  resize(height, width) {
    if (this.height === height && this.width === width) {
      return;
    }
    Object.assign(this, { height, width, chosen: undefined, pointed: undefined });
    this.step = Math.ceil(Math.max(height, width) / MOST_CELLS);
    const [rows, columns] = [Math.ceil(height / this.step), Math.ceil(width / this.step)];
    this.cells = Array.from({ length: rows }, (_, row) =>
      Array.from({ length: columns }, (_, column) => this.#cell(row, column)),
    );
    this.element.replaceChildren(
      ...this.cells.map((cells) => {
        const row = document.createElement("div");
        row.role = "row";
        row.append(...cells);
        return row;
      }),
    );
    const every = this.step > 1 ? `, every ${this.step}th of each side` : "";
    this.element.setAttribute("aria-label", `Patches of the image, ${height} rows by ${width} columns${every}`);
  }

  /** The patch at a place: its row and column, from 0, and its number. */
  patchAt({ x, y }) {
    const row = Math.min(Math.floor(y * this.height), this.height - 1);
    const column = Math.min(Math.floor(x * this.width), this.width - 1);
    return { row, column, position: row * this.width + column };
  }

  /** Mark the cell at a place as the chosen one, which Tab leads to. */
  choose(place) {
    const { row, column } = this.patchAt(place);
    if (this.chosen) {
      this.chosen.tabIndex = -1;
      this.chosen.ariaSelected = "false";
    }
    this.chosen = this.cells[Math.floor(row / this.step)][Math.floor(column / this.step)];
    this.chosen.tabIndex = 0;
    this.chosen.ariaSelected = "true";
  }

  #cell(row, column) {
    const cell = document.createElement("div");
    cell.role = "gridcell";
    cell.tabIndex = -1;
    cell.ariaSelected = "false";
    Object.assign(cell.dataset, { row, column });
    const patch = this.#patchOf(row, column);
    cell.ariaLabel = `row ${patch.row + 1}, column ${patch.column + 1}`;
    return cell;
  }

  /** The patch in the middle of a cell. */
  #patchOf(row, column) {
    const middle = Math.floor(this.step / 2);
    return {
      row: Math.min(row * this.step + middle, this.height - 1),
      column: Math.min(column * this.step + middle, this.width - 1),
    };
  }

  #placeOf(cell) {
    const { row, column } = this.#patchOf(Number(cell.dataset.row), Number(cell.dataset.column));
    return { x: (column + 0.5) / this.width, y: (row + 0.5) / this.height };
  }

  #cellOf(event) {
    return event.target.closest("[role=gridcell]");
  }

  #point(cell, onPoint) {
    if (cell === this.pointed) {
      return;
    }
    this.pointed?.classList.remove("pointed");
    cell?.classList.add("pointed");
    this.pointed = cell;
    onPoint(cell && this.#placeOf(cell));
  }

  #move(event) {
    const cell = this.#cellOf(event);
    if (!cell || event.altKey || event.metaKey) {
      return;
    }
    const [row, column] = [Number(cell.dataset.row), Number(cell.dataset.column)];
    const [lastRow, lastColumn] = [this.cells.length - 1, this.cells[0].length - 1];
    const targets = {
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      Home: [event.ctrlKey ? 0 : row, 0],
      End: [event.ctrlKey ? lastRow : row, lastColumn],
    };
    const target = targets[event.key];
    if (target) {
      event.preventDefault();
      this.cells[target[0]]?.[target[1]]?.focus();
    }
  }
}
