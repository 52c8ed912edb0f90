"use strict";
// The page shows everything without this script, which finds, sorts, compares and enlarges. Texts of the page are data to it: they
// are only ever set as text.
(() => {
  const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?(?=$|[\s%])/i;
  const { compare } = new Intl.Collator(undefined, { numeric: true });

  function make(tag, properties = {}, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  // --- tables

  /** The rows in the order of a column: as numbers where all of its cells are, else as texts. Cells without a value come last. */
  function sortTable(table, column, descending) {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, text: row.cells[column].textContent.trim() }));
    const empty = ({ text }) => ["", "-", "undefined"].includes(text);
    const numeric = rows.every((one) => empty(one) || NUMBER.test(one.text));
    const order = numeric ? (a, b) => parseFloat(a.text) - parseFloat(b.text) : (a, b) => compare(a.text, b.text);
    rows.sort((a, b) => empty(a) - empty(b) || (empty(a) ? 0 : (descending ? -1 : 1) * order(a, b)));
    body.append(...rows.map(({ row }) => row));
  }

  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    for (const [column, head] of heads.entries()) {
      if (!head.textContent || table.tBodies[0].rows.length < 2) continue;
      const button = make("button", { type: "button" }, head.textContent);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const descending = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortTable(table, column, descending);
      });
    }
  }

  // --- galleries

  const galleries = [];
  let active = null; // the gallery whose card was touched last

  /** Lay the second picture of each pair over the first, up to the slider. */
  function addSlider(pairs, place) {
    const labels = [...pairs[0].querySelectorAll(".label")].map((label) => label.textContent);
    const range = make("input", { type: "range", min: 0, max: 100, value: 50 });
    range.setAttribute("aria-label", labels.join(" | "));
    const show = () => pairs.forEach((pair) => pair.style.setProperty("--at", `${range.value}%`));
    range.addEventListener("input", show);
    pairs.forEach((pair) => pair.classList.add("stacked"));
    place.after(range);
    show();
    return range;
  }

  class Gallery {
    constructor(root) {
      this.root = root;
      this.list = root.querySelector(".cards");
      this.cards = [...this.list.children].map((element) => ({
        element,
        title: element.querySelector(".title").textContent,
        text: element.querySelector("figcaption").textContent.toLowerCase(),
        numbers: element.dataset.numbers.split(" ").map(Number),
        verdict: element.dataset.verdict,
        category: element.dataset.category,
      }));
      this.order = this.visible = this.cards;
      this.current = null;
      this.search = root.querySelector("input[type=search]");
      this.count = root.querySelector("output");
      this.verdicts = this.choices("verdict");
      this.categories = this.choices("category");
      this.orders = root.querySelector(".by-order select");
      for (const [index, name] of JSON.parse(root.dataset.numbers).entries()) {
        this.orders.append(make("option", { value: `-${index}` }, `${name}, highest first`));
        this.orders.append(make("option", { value: `+${index}` }, `${name}, lowest first`));
      }
      this.orders.append(make("option", { value: "title" }, "by name"));
      this.search.addEventListener("input", () => this.filter());
      this.verdicts.addEventListener("change", () => this.filter());
      this.categories.addEventListener("change", () => this.filter());
      this.orders.addEventListener("change", () => this.sort());
      this.list.addEventListener("focusin", (event) => this.touch(event.target));
      this.list.addEventListener("click", (event) => {
        const card = this.touch(event.target);
        if (!card || !event.target.closest("a") || event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        zoom.show(this, card);
      });
      if (root.classList.contains("slider")) {
        for (const { element } of this.cards) addSlider([...element.querySelectorAll(".pair")], element.querySelector(".views"));
      }
      root.querySelector(".tools").hidden = false;
      this.filter();
    }

    /** The choices of a select box: what the cards have, and how often. It is hidden where that is one thing. */
    choices(name) {
      const select = this.root.querySelector(`.by-${name} select`);
      const counts = new Map();
      for (const card of this.cards) counts.set(card[name], (counts.get(card[name]) ?? 0) + 1);
      for (const value of [...counts.keys()].filter(Boolean).sort(compare)) {
        select.append(make("option", { value }, `${value} (${counts.get(value)})`));
      }
      select.parentElement.hidden = counts.size < 2;
      return select;
    }

    filter() {
      const words = this.search.value.toLowerCase().split(/\s+/);
      const fits = (card) =>
        words.every((word) => card.text.includes(word)) &&
        (!this.verdicts.value || card.verdict === this.verdicts.value) &&
        (!this.categories.value || card.category === this.categories.value);
      for (const card of this.cards) card.element.hidden = !fits(card);
      this.visible = this.order.filter((card) => !card.element.hidden);
      this.count.textContent = `${this.visible.length} of ${this.cards.length}`;
    }

    sort() {
      const by = this.orders.value;
      if (by === "") this.order = this.cards;
      else if (by === "title") this.order = [...this.cards].sort((a, b) => compare(a.title, b.title));
      else {
        const [sign, index] = [by[0] === "-" ? -1 : 1, Number(by.slice(1))];
        this.order = [...this.cards].sort((a, b) => sign * (a.numbers[index] - b.numbers[index]));
      }
      this.list.append(...this.order.map((card) => card.element));
      this.filter();
    }

    touch(target) {
      const element = target.closest(".card");
      if (!element) return null;
      active = this;
      this.current = this.cards.find((card) => card.element === element);
      return this.current;
    }

    /** The card that is `step` after the current one, of those that are shown. */
    next(step) {
      const at = this.visible.indexOf(this.current);
      const to = at < 0 ? 0 : Math.min(Math.max(at + step, 0), this.visible.length - 1);
      return this.visible[to];
    }

    focus(card) {
      card.element.querySelector("a").focus({ preventScroll: true });
      card.element.scrollIntoView({ block: "nearest" });
    }
  }

  // --- a closer look

  class Zoom {
    constructor() {
      this.about = make("div", { className: "about" });
      this.stage = make("div", { className: "stage" });
      const button = (text, action) => {
        const made = make("button", { type: "button" }, text);
        made.addEventListener("click", action);
        return made;
      };
      this.forward = button("Next", () => this.move(1));
      this.header = make(
        "header",
        {},
        this.about,
        button("Previous", () => this.move(-1)),
        this.forward,
        button("Close", () => this.dialog.close()),
      );
      this.dialog = make("dialog", {}, this.header, this.stage);
      this.dialog.setAttribute("aria-label", "Closer look");
      this.dialog.addEventListener("close", () => this.gallery.focus(this.card));
      document.body.append(this.dialog);
    }

    show(gallery, card) {
      this.gallery = gallery;
      this.card = gallery.current = card;
      this.about.replaceChildren(...[...card.element.querySelector("figcaption").childNodes].map((node) => node.cloneNode(true)));
      const pairs = [...card.element.querySelectorAll(".pair")].map((pair) => this.enlarged(pair));
      this.stage.replaceChildren(...pairs);
      this.dialog.querySelector("input")?.remove();
      if (pairs[0].children.length === 2) addSlider(pairs, this.stage);
      if (!this.dialog.open) this.dialog.showModal();
      this.forward.focus();
    }

    /** A pair with the larger pictures, where there are any that the browser can show. */
    enlarged(pair) {
      const views = [...pair.querySelectorAll("a")].map((link) => {
        const shown = link.querySelector("img");
        const image = make("img", { src: link.href, alt: shown.alt, className: shown.className });
        image.addEventListener("error", () => (image.src = shown.src), { once: true });
        return make("a", {}, image, make("span", { className: "label" }, link.textContent));
      });
      const made = make("div", { className: "pair" }, ...views);
      const first = pair.querySelector("img");
      made.style.setProperty("--ratio", first.getAttribute("width") / first.getAttribute("height"));
      return made;
    }

    move(step) {
      this.show(this.gallery, this.gallery.next(step));
    }
  }

  const zoom = new Zoom();
  galleries.push(...[...document.querySelectorAll(".gallery")].map((root) => new Gallery(root)));

  // --- keys

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !galleries.length) return;
    const gallery = active ?? galleries[0];
    const { key, target } = event;
    if (target.matches("input[type=search], select")) {
      if (key === "Escape" || (key === "Enter" && target.type === "search")) target.blur();
      return;
    }
    const arrows = target.matches("input[type=range]") ? {} : { ArrowRight: 1, ArrowLeft: -1 };
    const step = { j: 1, k: -1, ...arrows }[key];
    if (step && gallery.visible.length) {
      if (zoom.dialog.open) zoom.move(step);
      else gallery.focus(gallery.next(step));
    } else if (key === "z") {
      if (zoom.dialog.open) zoom.dialog.close();
      else if (gallery.visible.length) zoom.show(gallery, gallery.next(0));
    } else if (key === "/" && !zoom.dialog.open) {
      gallery.search.focus();
      gallery.search.select();
    } else return;
    event.preventDefault();
  });
})();
