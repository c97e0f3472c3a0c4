"use strict";

const root = document.documentElement;
const { figures, templates } = JSON.parse(document.getElementById("data").textContent);
const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => root.dataset.theme ?? (systemIsDark.matches ? "dark" : "light");

/* Figures: drawn when their panel is first seen, and again when dark and light change. */

async function loadPlotly() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(plain).text();
  document.head.append(script);
}

/* On a phone a crowd's names would cover each other: there a tap on a point tells its name. */
function fitted(trace, width) {
  const crowded = width < 520 && trace.mode === "markers+text" && trace.text.length > 12;
  return crowded ? { ...trace, mode: "markers" } : trace;
}

function draw(place) {
  const { data, layout } = figures[place.dataset.figure];
  // A finger on a figure scrolls the page; a mouse zooms.
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const config = { responsive: true, displayModeBar: false };
  const traces = data.map((trace) => fitted(trace, place.clientWidth));
  Plotly.react(place, traces, { ...layout, dragmode, template: templates[theme()] }, config);
  Plotly.Plots.resize(place); // the window may have changed while the panel was hidden
}

function drawVisible() {
  for (const place of document.querySelectorAll("article:not([hidden]) .plot")) draw(place);
}

document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = theme() === "dark" ? "light" : "dark";
  drawVisible();
});
systemIsDark.addEventListener("change", drawVisible);

/* Tabs: arrow keys, Home and End move; the others are out of the tab order. */

const tabs = [...document.querySelectorAll('[role="tab"]')];

function show(chosen) {
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", tab === chosen);
    tab.tabIndex = tab === chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  chosen.scrollIntoView({ block: "nearest", inline: "nearest" });
  if (window.Plotly) drawVisible();
}

function moveFocus(event) {
  const here = tabs.indexOf(event.target);
  const goal = { ArrowRight: here + 1, ArrowLeft: here - 1 + tabs.length, Home: 0, End: tabs.length - 1 }[event.key];
  if (goal === undefined) return;
  event.preventDefault();
  const tab = tabs[goal % tabs.length];
  tab.focus();
  show(tab);
}

for (const tab of tabs) {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", moveFocus);
}
if (tabs.length) show(tabs[0]);

/* Tables: a column's button sorts by it, and back. Numbers start with the largest; empty cells stay last. */

function sortBy(header) {
  const table = header.closest("table");
  const body = table.tBodies[0];
  const column = header.cellIndex;
  const ranks = new Map([...body.rows].map((row) => [row, row.cells[column].dataset.rank ?? ""]));
  const numeric = [...ranks.values()].every((rank) => rank === "" || !Number.isNaN(Number(rank)));
  const before = header.getAttribute("aria-sort");
  const descending = before === null ? numeric : before === "ascending";
  const compare = numeric ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
  const sorted = [...body.rows].sort((one, other) => {
    const [a, b] = [ranks.get(one), ranks.get(other)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return descending ? compare(b, a) : compare(a, b);
  });
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  body.append(...sorted);
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

loadPlotly().then(drawVisible);
