"use strict";
const $ = (id) => document.getElementById(id);
const { page, items } = JSON.parse($("data").textContent);
const rater = decodeURIComponent(location.hash.slice(1)).trim();
const slot = `review/${page}/${rater}`;
let votes = [], at = 0;

// FNV-1a over UTF-8, then murmur3's last mix, so that every bit depends on every character.
function hash(...parts) {
  let h = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(parts.join("\n"))) h = Math.imul(h ^ byte, 0x01000193);
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return (h ^ (h >>> 16)) >>> 0;
}

// Every item once, in an order of this rater's own; then the first tenth again, as far away as can be, sides swapped.
function freshVotes() {
  const vote = (item, repeat) => ({ item, repeat, left: (hash("side", page, item, rater) & 1) ^ repeat, choice: null,
    acceptable: [null, null], tags: [[], []], comment: "" });
  const order = items.map(({ item }) => [hash("order", page, item, rater), item]).sort((a, b) => a[0] - b[0]);
  const again = order.slice(0, Math.ceil(items.length / 10));
  return [...order.map(([, item]) => vote(item, false)), ...again.map(([, item]) => vote(item, true))];
}

function save() {
  try {
    localStorage.setItem(slot, JSON.stringify(votes));
  } catch {
    $("unsaved").hidden = false;
  }
}

function load() {
  try {
    return JSON.parse(localStorage.getItem(slot)) ?? freshVotes();
  } catch {
    $("unsaved").hidden = false;
    return freshVotes();
  }
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function draw() {
  const rated = votes.filter((vote) => vote.choice).length, vote = votes[at];
  $("progress").max = votes.length;
  $("progress").value = rated;
  $("count").textContent = `${vote ? `${at + 1} of ${votes.length} · ` : ""}${rated} rated`;
  $("rate").hidden = !vote;
  $("done").hidden = Boolean(vote);
  $("choices").hidden = $("next").hidden = !vote;
  $("back").disabled = at === 0;
  if (!vote) return;
  const { turns, answers } = items.find(({ item }) => item === vote.item);
  $("prompt").replaceChildren(...turns.flatMap(([role, text]) => [element("h2", role), element("pre", text)]));
  $("answer-0").textContent = answers[vote.left];
  $("answer-1").textContent = answers[1 - vote.left];
  $("comment").value = vote.comment;
  $("next").disabled = !vote.choice;
  for (const button of document.querySelectorAll("[data-choice], [data-side]")) {
    const { choice, side, tag, acceptable } = button.dataset;
    const on = choice ? vote.choice === choice : tag ? vote.tags[side].includes(tag) : String(vote.acceptable[side]) === acceptable;
    button.setAttribute("aria-pressed", on);
  }
}

function press({ choice, side, tag, acceptable, step }) {
  const vote = votes[at];
  if (choice) vote.choice = choice;
  if (tag) vote.tags[side] = vote.tags[side].includes(tag) ? vote.tags[side].filter((one) => one !== tag) : [...vote.tags[side], tag];
  if (acceptable) vote.acceptable[side] = vote.acceptable[side] === JSON.parse(acceptable) ? null : JSON.parse(acceptable);
  if (step) {
    at += Number(step);
    scrollTo(0, 0);
  }
  save();
  draw();
}

function download() {
  const kept = { schema_version: 1, kind: "review votes", page, rater, votes: votes.filter((vote) => vote.choice) };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(kept, null, 1)], { type: "application/json" }));
  link.download = `votes-${rater.replace(/[^\p{L}\p{N}_-]+/gu, "_")}.json`;
  link.click();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || button.form) return;
  // A clicked button would answer the next Enter in place of "next"; one reached with Tab keeps the focus.
  if (event.detail) button.blur();
  if (button.className === "download") download();
  else press(button.dataset);
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !rater) return;
  if (event.target === $("comment")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  if (event.key === "Enter" && event.target.closest("button")) return;
  const key = event.key === "Enter" ? "ArrowRight" : event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const button = document.querySelector(`button[data-key="${CSS.escape(key)}"]`);
  if (key === "c") $("comment").focus();
  else if (button && button.offsetParent) button.click();
  else return;
  event.preventDefault();
});
$("comment").addEventListener("input", () => {
  votes[at].comment = $("comment").value;
  save();
});
$("start").addEventListener("submit", (event) => {
  event.preventDefault();
  location.hash = encodeURIComponent($("name").value.trim());
});
addEventListener("hashchange", () => location.reload());

$("start").hidden = Boolean(rater);
if (rater) {
  votes = load();
  at = votes.findIndex((vote) => !vote.choice);
  if (at < 0) at = votes.length;
  $("bar").hidden = $("top").hidden = false;
  save();
  draw();
} else $("name").focus();
