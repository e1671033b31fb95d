"use strict";

// The cards of a page that match its filters, some at a time. The page's own script says:
//   matches(card, wanted)  whether the filters, a FormData, leave a card; the search is done here
//   compare(wanted)        how cards are sorted, null for as they stand
//   onShow(cards)          these came onto the page
//   onApply(wanted)        the filters were applied
function openGallery({ cardsAtOnce, matches, compare = () => null, onShow = () => {}, onApply = () => {} }) {
  const find = (id) => document.getElementById(id);
  const images = JSON.parse(find("images").textContent);
  const cards = [...find("cards").content.children];
  const gallery = find("gallery");
  const filters = find("filters");
  const texts = new Map();
  let matching = [];
  let shown = 0;

  const normalise = (text) => text.normalize("NFKC").toLowerCase().trim();

  function readText(card) {
    if (!texts.has(card)) {
      // What an answer lacks stands in it, too, and is not a part of it.
      const parts = [...card.querySelectorAll("[data-text]")].map((part) =>
        [...part.childNodes].filter((node) => node.nodeName !== "DEL").map((node) => node.textContent).join(""));
      texts.set(card, normalise(parts.join("\n")));
    }
    return texts.get(card);
  }

  function apply() {
    const wanted = new FormData(filters);
    const query = normalise(wanted.get("query"));
    matching = cards.filter((card) => matches(card, wanted) && readText(card).includes(query));
    const order = compare(wanted);
    if (order) matching.sort(order);
    gallery.replaceChildren();
    shown = 0;
    showMore();
    find("matching").textContent = matching.length.toLocaleString("en");
    find("nothing").hidden = matching.length > 0;
    onApply(wanted);
  }

  function showMore() {
    const next = matching.slice(shown, shown + cardsAtOnce);
    for (const image of next.flatMap((card) => [...card.querySelectorAll("img:not([src])")])) {
      image.src = images[image.dataset.image];
    }
    gallery.append(...next);
    shown += next.length;
    onShow(next);
    const left = matching.length - shown;
    find("more").hidden = left === 0;
    find("left").textContent = left.toLocaleString("en");
    return next[0];
  }

  filters.addEventListener("input", apply);
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(apply));
  find("more").addEventListener("click", () => {
    const first = showMore();
    if (first) first.focus({ preventScroll: true });
  });
  return { gallery, filters, apply };
}
