"use strict";
// Values under the pointer.
for (const figure of document.querySelectorAll(".chart")) {
  const script = figure.querySelector("script");
  if (!script) continue;
  const svg = figure.querySelector("svg"), group = svg.querySelector(".pointer");
  const { x, y, box, label, lines } = JSON.parse(script.textContent);
  const colors = [...svg.querySelectorAll(".line")].map((each) => getComputedStyle(each).getPropertyValue("--c"));
  const [left, top, right, bottom] = box;
  const scale = ([low, high, log], start, end) => (value) => {
    const f = log ? Math.log : (v) => v;
    return start + ((f(value) - f(low)) / (f(high) - f(low))) * (end - start);
  };
  const toX = scale(x, left, right), toY = scale(y, bottom, top);
  const text = (value) => Number(value.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
  const node = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    return made;
  };
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const hide = () => { tip.hidden = true; group.replaceChildren(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const at = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
    const nearest = lines.map(({ points }) =>
      points.reduce((best, point) => (Math.abs(toX(point[0]) - at) < Math.abs(toX(best[0]) - at) ? point : best)));
    const distance = (point) => Math.abs(toX(point[0]) - at);
    const first = nearest.reduce((best, point) => (distance(point) < distance(best) ? point : best));
    const px = toX(first[0]);
    group.replaceChildren(node("line", { x1: px, x2: px, y1: top, y2: bottom }));
    const rows = [`${label} ${text(first[0])}`];
    lines.forEach((line, i) => {
      if (Math.abs(toX(nearest[i][0]) - px) > 12) return;
      const circle = node("circle", { cx: toX(nearest[i][0]), cy: toY(nearest[i][1]), r: 4 });
      circle.style.setProperty("--c", colors[i]);
      group.append(circle);
      rows.push(`${line.label}: ${text(nearest[i][1])}`);
    });
    tip.replaceChildren(...rows.map((row) => Object.assign(document.createElement("div"), { textContent: row })));
    tip.hidden = false;
    const outer = figure.getBoundingClientRect();
    const place = (px / svg.viewBox.baseVal.width) * frame.width + frame.left - outer.left;
    const before = place > frame.width / 2;
    tip.style.left = before ? "" : `${place + 14}px`;
    tip.style.right = before ? `${figure.clientWidth - place + 14}px` : "";
    tip.style.top = `${frame.top - outer.top + 12}px`;
  });
}
// One image at a time, chosen by a slider.
for (const previews of document.querySelectorAll(".previews")) {
  const figures = [...previews.querySelectorAll("figure[data-step]")];
  if (figures.length < 2) continue;
  const slider = document.createElement("label"), input = document.createElement("input"), output = document.createElement("output");
  Object.assign(input, { type: "range", min: 0, max: figures.length - 1, value: figures.length - 1 });
  input.setAttribute("aria-label", "step of the images");
  const show = () => {
    figures.forEach((figure, i) => figure.classList.toggle("now", i === Number(input.value)));
    output.textContent = `step ${Number(figures[input.value].dataset.step).toLocaleString("en")}`;
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", show);
  slider.className = "slider";
  slider.append(input, output);
  previews.querySelector("h4").after(slider);
  previews.classList.add("slid");
  show();
}
