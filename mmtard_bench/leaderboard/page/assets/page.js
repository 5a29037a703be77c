/* A model, figures that others reported, and the way from one view to another. */

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const list = (items) => html("ul", {}, items.map((item) => html("li", {}, item)));
const strong = (text) => html("strong", {}, text);

function command(text) {
  const code = html("pre", {tabindex: "0"}, text);
  const said = html("span", {class: "quiet", role: "status"});
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      said.replaceChildren("copied");
    } catch {
      getSelection().selectAllChildren(code);
      said.replaceChildren("selected: copy it with the keyboard");
    }
  }
  const button = html("button", {type: "button", class: "copy", click: copy}, "Copy");
  return [code, html("p", {class: "controls"}, button, said)];
}

/* A model's figures on a suite: a row per task, a column per threat model. */
function figuresOf(suite, row) {
  const names = (part) => [...new Set(suite.tasks.flatMap((task) => task[part]))];
  return makeTable(`${row.model} on ${suite.name}, by task`, [
    {title: "task", head: true, cell: (task) => task.name},
    ...resultColumns(names("joint"), names("threats"), (task) => row.tasks[task.name]),
  ], suite.tasks).node;
}

function resultsOf(suite, row) {
  const weights = {title: "weights", head: true, cell: () => row.digest.slice(0, 8)};
  return [
    heading(3, html("a", {href: suitePath(suite.name)}, suite.name)),
    makeTable(`${row.model} on ${suite.name}`, overviewColumns(suite, weights), [row]).node,
    list(row.badges.filter(([kind]) => ["incomplete", "protocol"].includes(kind)).map(
      ([, text, detail]) => [strong(text), `: ${detail}`])),
    row.remarks.length > 0 && list(row.remarks.map(
      ([code, detail, where]) => [strong(code), `: ${detail} (${where})`])),
    row.credits.length > 0 && list(row.credits.map(({by, paper, date, samples}) => [
      strong("stronger attack"), ` by ${by}, ${date}: broke ${plural(samples, "sample")} of the worst cases `,
      paper && outside(paper)])),
    figuresOf(suite, row),
    quiet("To reproduce this row:"), ...command(row.reproduce),
  ];
}

function modelView(name) {
  const model = Object.hasOwn(data.models, name) ? data.models[name] : null;
  const found = data.suites.flatMap(
    (suite) => suite.rows.filter((row) => row.model === name).map((row) => [suite, row]));
  if (!model && !found.length) return lost();
  const said = (values) => values.flatMap((value, i) => [i > 0 && "; ", outside(value)]).filter(Boolean);
  return [
    heading(1, name),
    heading(2, "Card"),
    model
      ? html("dl", {}, model.card.flatMap(([field, values]) => [
        html("dt", {}, field), html("dd", {}, values.length ? said(values) : "not stated")]))
      : quiet("No card: these records belong to a run, not to an entry."),
    heading(2, "Verification"),
    model?.history.length
      ? list(model.history.map((v) => [
        strong(v.level), ` on ${v.suite}, ${v.date}, by ${v.by} with ${v.version}: ${v.detail}`,
        !v.current && " (void: the records have changed since)"]))
      : quiet("Nobody has verified these records yet."),
    heading(2, "Results"),
    ...found.flatMap(([suite, row]) => resultsOf(suite, row)),
  ].filter(Boolean);
}

function reportedView() {
  return [
    heading(1, "Reported by others"), html("p", {}, "Accuracies in percent, as their authors published them: " +
      "without samples, seeds or intervals. ", strong("Nobody checked them here"), ", so they are not ranked among " +
      "the records. Do not compare figures of different protocols."),
    ...data.reported.flatMap(({title, headers, rows}) => [
      heading(2, title), textTable(`${title}, not checked here`, headers, rows)]),
  ];
}

const lost = () => [heading(1, "Not here"), quiet("This leaderboard has no suite or model of that name.")];

/* Views are kept, so that the order and the filter stay when a reader comes back. */
const views = new Map();
const paths = [
  ...data.suites.map((suite) => [suitePath(suite.name), suite.name]),
  ...(data.reported.length ? [["#/reported", "reported by others"]] : []),
];

function viewOf(path) {
  const [, kind, rest] = /^#\/([a-z]+)\/?(.*)$/.exec(path) ?? [];
  let name;
  try {
    name = decodeURIComponent(rest);
  } catch {
    return lost();
  }
  if (kind === "model") return modelView(name);
  if (kind === "reported") return reportedView();
  const suite = data.suites.find((of) => of.name === name);
  return kind === "suite" && suite ? suiteView(suite) : lost();
}

function show() {
  const path = location.hash.length > 2 ? location.hash : paths[0]?.[0] ?? "";
  if (!views.has(path)) views.set(path, paths.length ? viewOf(path) : [quiet("There are no records yet.")]);
  main.replaceChildren(...views.get(path));
  document.getElementById("about").hidden = !path.startsWith("#/suite/");
  document.title = `${main.querySelector("h1")?.textContent ?? "Empty"} – mmtard_bench leaderboard`;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.getAttribute("href") === path) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/* The button offers the other theme, whether the system or an earlier press chose this one. */
function themeButton(button) {
  const chosen = document.documentElement.dataset;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const other = () => ((chosen.theme ?? (system.matches ? "dark" : "light")) === "dark" ? "light" : "dark");
  const name = () => button.replaceChildren(other() === "dark" ? "Dark theme" : "Light theme");
  button.addEventListener("click", () => { chosen.theme = other(); name(); });
  system.addEventListener("change", name);
  button.hidden = false;
  name();
}

function start() {
  const nav = document.getElementById("suites");
  nav.append(...paths.map(([path, text]) => html("a", {href: path}, text)));
  const skip = document.getElementById("skip");
  skip.addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
  themeButton(document.getElementById("theme"));
  addEventListener("hashchange", () => { show(); main.querySelector("h1")?.focus(); });
  show();
}

start();
