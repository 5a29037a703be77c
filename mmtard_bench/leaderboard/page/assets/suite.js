/* A suite: its table with filters, its charts, a table per task. */

const quiet = (...children) => html("p", {class: "quiet"}, ...children);
const heading = (level, text) => html(`h${level}`, {tabindex: level === 1 && "-1"}, text);

/* A badge is [kind, text, detail]; kinds that are not here are warnings. */
const LOOKS = {verified: "good", unverified: "", fact: ""};
const badge = ([kind, text, detail]) =>
  html("span", {class: `badge ${LOOKS[kind] ?? "warn"}`, title: detail}, text);
const badges = (row) => html("div", {class: "badges"}, row.badges.map(badge));

function badgeLegend() {
  return html("details", {}, html("summary", {}, "What the badges mean"), html("dl", {}, data.legend.map(
    (of) => [html("dt", {}, badge(of)), html("dd", {}, of[2])])));
}

const modelColumn = {
  title: "model", head: true, value: (row) => row.model,
  cell: (row) => html("a", {href: modelPath(row.model)}, row.model),
};

function figureColumn(title, figure) {
  return {
    title, number: true, down: true,
    value: (row) => (Array.isArray(figure(row)) ? figure(row)[0] : null),
    cell: (row) => asCell(figure(row)),
  };
}

/* The column `first` names the row: by its model, or on the page of a model by its weights. */
function overviewColumns(suite, first) {
  const among = (place) => suite.rows.filter((row) => row.place === place).length;
  return [
    {title: "place", number: true, value: (row) => row.place,
      cell: (row) => (row.place && among(row.place) > 1 ? `${row.place}=` : row.place ?? NOTHING)},
    first,
    figureColumn(suite.average, (row) => row.clean),
    ...suite.balls.map((ball) => figureColumn(`worst case ${ball}`, (row) => row.worst[ball])),
    {title: "badges", down: true, value: (row) => row.level, cell: badges},
    {title: "cost", number: true, value: (row) => row.forward + row.backward, cell: (row) => [
      `${whole(row.forward)} + ${whole(row.backward)}`,
      html("span", {class: "interval"}, `${whole(row.seconds)} s`)]},
  ];
}

/* `of` gives the results of a table row, which are those of one model on one task. */
const resultColumns = (balls, threats, of) => [
  figureColumn("clean", (row) => of(row).clean),
  ...balls.map((ball) => figureColumn(`worst case ${ball}`, (row) => of(row).worst[ball])),
  ...threats.map((name) => figureColumn(name, (row) => of(row).robust[name])),
];

const taskTable = (suite, task) => makeTable(`${task.name} on ${suite.name}`, [
  modelColumn, ...resultColumns(task.joint, task.threats, (row) => row.tasks[task.name])]);

function recallTable(suite) {
  const lines = suite.rows.flatMap((row) => row.recalls.map((cells) => [row.model, ...cells]));
  return lines.length > 0 && [
    quiet("Recall in percent. Clean and robust accuracy above are image-to-text recall at 1. The attacks aim at " +
      "that recall only, so the other attacked recalls are upper bounds."),
    textTable(`Recalls on ${suite.name}`, ["model", ...data.recall_headers], lines),
  ];
}

/* `changed` receives the rows that pass the filter, after every change of it. */
function filters(suite, changed) {
  const text = html("input", {type: "search", id: "filter", autocomplete: "off", input: () => apply()});
  const only = html("input", {type: "checkbox", id: "verified", change: () => apply()});
  const count = html("span", {class: "quiet", role: "status"});
  function apply() {
    const words = text.value.toLowerCase().split(/\s+/);
    const rows = suite.rows.filter((row) => {
      const said = [row.model, ...row.badges.map((badge) => badge[1])].join(" ").toLowerCase();
      return words.every((word) => said.includes(word)) && (!only.checked || row.level !== null);
    });
    count.replaceChildren(`${rows.length} of ${suite.rows.length} models`);
    changed(rows);
  }
  const node = html("div", {class: "controls"},
    html("label", {}, "Filter", text), html("label", {}, only, "verified only"), count);
  return {node, apply};
}

function suiteView(suite) {
  let rows = suite.rows, ball = suite.deciding;
  const table = makeTable(`Models on ${suite.name}`, overviewColumns(suite, modelColumn));
  const against = chart(`Clean against robust accuracy on ${suite.name}`,
    "Whiskers are 95% intervals. Point at a mark, or go there with Tab, for its figures.",
    (...where) => scatter(rows, ball, suite.average, ...where));
  const choose = (event) => { ball = event.target.value; against.show(); };
  const balls = suite.balls.map((name) => html("option", {value: name, selected: name === ball}, name));
  const lines = suite.tasks.flatMap((task) => task.curves.map((name) => chart(
    `${task.name}, ${name}`, "Whiskers are 95% intervals, points are radii.",
    (...where) => curves(rows, task.name, name, ...where))));
  const tasks = suite.tasks.map((task) => taskTable(suite, task));
  const filter = filters(suite, (left) => {
    rows = left;
    for (const of of [table, against, ...lines, ...tasks]) of.show(rows);
  });
  filter.apply();
  return [
    heading(1, suite.name), quiet(suite.about), filter.node, table.node, badgeLegend(),
    quiet("The place of a model is one more than the number of models that are significantly better in the worst " +
      `case ${suite.deciding} (McNemar's exact test on the same samples, 5% after Holm's correction). ` +
      "Models that these samples cannot tell apart share a place (=)."),
    balls.length > 0 && [
      heading(2, "Clean against robust"),
      balls.length > 1 && html("p", {class: "controls"},
        html("label", {}, "worst case", html("select", {id: "ball", change: choose}, balls))),
      html("div", {class: "charts"}, against.node, legend(suite.rows)),
    ],
    lines.length > 0 && [
      heading(2, "Robust accuracy against eps"),
      ...lines.flatMap((of) => [
        heading(3, of.label), html("div", {class: "charts"}, of.node, legend(suite.rows))]),
    ],
    heading(2, "By task"),
    ...tasks.flatMap((of, place) => [heading(3, suite.tasks[place].name), of.node]),
    recallTable(suite),
  ].flat().filter(Boolean);
}
