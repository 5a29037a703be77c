/* Charts: robust against clean accuracy, and robust accuracy against eps. */

const COLOURS = 6;
const MARGIN = {left: 36, right: 26, top: 30, bottom: 46};

/* Each row has its own shape, filled or hollow, so that colour is not needed to tell rows apart. */
function mark(number, x, y) {
  const shapes = data.shapes;
  const hollow = number % (2 * shapes.length) >= shapes.length;
  return svg("path", {
    d: shapes[number % shapes.length],
    transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
    class: `series-${number % COLOURS}${hollow ? " hollow" : ""}`,
  });
}

function legend(rows) {
  return html("ul", {class: "legend", "aria-label": "Legend"}, rows.map((row) => html(
    "li", {},
    svg("svg", {width: 16, height: 16, "aria-hidden": "true"}, mark(row.mark, 8, 8)),
    row.model,
  )));
}

/* An axis from ten to ten around the intervals, at least twenty points long. */
function tens(figures) {
  let low = Math.max(0, Math.floor(Math.min(...figures.map((f) => f[1])) / 10) * 10);
  let high = Math.min(100, Math.ceil(Math.max(...figures.map((f) => f[2])) / 10) * 10);
  if (high - low < 20) [low, high] = [Math.max(0, high - 20), Math.max(20, high)];
  const step = high - low > 60 ? 20 : 10;
  const ticks = [];
  for (let tick = low; tick <= high; tick += step) ticks.push([tick, String(tick)]);
  return {low, high, ticks};
}

/* An empty drawing with axes; `at.x` and `at.y` turn a value into a position. */
function axes(width, x, y, label) {
  const height = Math.round(Math.max(250, Math.min(400, width * 0.65)));
  const [right, bottom] = [width - MARGIN.right, height - MARGIN.bottom];
  const at = {
    x: (value) => MARGIN.left + (value - x.low) / (x.high - x.low) * (right - MARGIN.left),
    y: (value) => bottom - (value - y.low) / (y.high - y.low) * (bottom - MARGIN.top),
  };
  const line = (x1, y1, x2, y2) => svg("line", {class: "grid", x1, y1, x2, y2});
  const root = svg(
    "svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": label},
    x.ticks.map(([value, text]) => [
      line(at.x(value), MARGIN.top, at.x(value), bottom),
      svg("text", {x: at.x(value), y: bottom + 17, "text-anchor": "middle"}, text),
    ]).flat(),
    y.ticks.map(([value, text]) => [
      line(MARGIN.left, at.y(value), right, at.y(value)),
      svg("text", {x: MARGIN.left - 7, y: at.y(value) + 4, "text-anchor": "end"}, text),
    ]).flat(),
    svg("text", {x: right, y: height - 8, "text-anchor": "end"}, x.title),
    svg("text", {x: 0, y: 12}, y.title),
  );
  return {root, at};
}

function whisker(number, at, horizontal, along, across) {
  const [low, high, place] = horizontal
    ? [at.x(along[1]), at.x(along[2]), at.y(across)]
    : [at.y(along[1]), at.y(along[2]), at.x(across)];
  const ends = horizontal ? {x1: low, x2: high, y1: place, y2: place}
    : {x1: place, x2: place, y1: low, y2: high};
  return svg("line", {class: `whisker series-${number % COLOURS}`, ...ends});
}

/* A chart is drawn for the width of its box, again when the width changes. The caption names the
   point under the pointer. */
function chart(label, hint, draw) {
  const caption = html("figcaption", {"aria-live": "polite"}, hint);
  const box = html("div");
  const node = html("figure", {}, box, caption);
  const say = (text) => caption.replaceChildren(text);
  let width = 0;
  const show = () => width && box.replaceChildren(draw(width, label, say));
  new ResizeObserver(([entry]) => requestAnimationFrame(() => {
    const wide = Math.floor(entry.contentRect.width);
    if (wide === width) return;
    width = wide;
    show();
  })).observe(box);
  return {label, node, show};
}

function point(row, x, y, text, say) {
  return svg(
    "a", {href: modelPath(row.model), class: "point", "aria-label": text,
      focus: () => say(text), pointerenter: () => say(text)},
    svg("title", {}, text), mark(row.mark, x, y),
  );
}

function scatter(rows, ball, clean, width, label, say) {
  const shown = rows.filter((row) => row.clean && row.worst[ball]);
  if (!shown.length) return quiet("No complete row to draw.");
  const x = {...tens(shown.map((row) => row.clean)), title: `${clean}, %`};
  const y = {...tens(shown.map((row) => row.worst[ball])), title: `worst case ${ball}, %`};
  const {root, at} = axes(width, x, y, label);
  root.append(...shown.flatMap((row) => [
    whisker(row.mark, at, true, row.clean, row.worst[ball][0]),
    whisker(row.mark, at, false, row.worst[ball], row.clean[0]),
  ]), ...shown.map((row) => {
    const worst = row.worst[ball];
    const text = `${row.model}: ${clean} ${asText(row.clean)}, worst case ${ball} ${asText(worst)}`;
    return point(row, at.x(row.clean[0]), at.y(worst[0]), text, say);
  }));
  return root;
}

function fraction(text) {
  const [above, below] = text.split("/");
  return below ? above / below : Number(above);
}

/* Ticks are exact fractions; ticks that would overlap are left out, but never the largest. */
function radii(curves) {
  const texts = [...new Set(curves.flatMap((points) => points.map((p) => p[0])))];
  texts.sort((a, b) => fraction(a) - fraction(b));
  const high = fraction(texts.at(-1));
  const ticks = [[high, texts.at(-1)]];
  for (const text of texts) {
    const value = fraction(text);
    if (ticks.every(([other]) => Math.abs(other - value) >= high / 5)) ticks.push([value, text]);
  }
  return {low: 0, high, ticks, title: "eps (at 0: clean accuracy)"};
}

/* The curve of a row on a task: a list of points [eps, value, low, high]. */
const curveOf = (row, task, name) => row.tasks[task].curves[name];

function curves(rows, task, name, width, label, say) {
  const shown = rows.filter((row) => curveOf(row, task, name));
  if (!shown.length) return quiet("No row to draw.");
  const every = shown.map((row) => curveOf(row, task, name));
  const y = {...tens(every.flat().map((p) => p.slice(1))), title: "robust accuracy, %"};
  const {root, at} = axes(width, radii(every), y, label);
  shown.forEach((row, place) => {
    const points = every[place].map(([eps, ...figure]) => [fraction(eps), figure, eps]);
    const path = points.map(([x, figure]) => `${at.x(x)},${at.y(figure[0])}`).join(" ");
    root.append(
      svg("polyline", {class: `curve series-${row.mark % COLOURS}`, points: path}),
      ...points.map(([x, figure]) => whisker(row.mark, at, false, figure, x)),
      ...points.map(([x, figure, eps]) => point(
        row, at.x(x), at.y(figure[0]), `${row.model}: ${asText(figure)} at eps ${eps}`, say)),
    );
  });
  return root;
}
