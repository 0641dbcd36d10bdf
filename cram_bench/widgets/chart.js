// A chart in the panel. `spec` is Vega-Lite's, over data that are named; `rows` has the rows of each name. A chart stays
// on the page while its rows change. usermeta: `axes`, pixels beside the parts; `parts`, their shares of the rest; `wrap`,
// parts go below each other where there is little room; `pick`, the column that a click writes into `picked`.
function render({ model, el }) {
  const host = el.appendChild(document.createElement("div"));
  el.classList.add("cram-bench-chart");
  let shown = null, wide = 0, last = Promise.resolve();

  const after = step => { last = last.then(step).catch(error => console.error(error)); };

  function laid(spec, width, more) {
    const { axes = 60, parts = [1], wrap = false } = spec.usermeta || {};
    const longest = Math.max(0, ...Object.values(spec.datasets).flat().map(row => (row.run || "").length));
    spec.config.legend.columns = Math.max(1, Math.floor((width - 20) / (6.8 * longest + 35)));
    spec.config.legend.labelLimit = Math.max(100, width - 60);
    const narrow = width < 560, small = width < 320 ? 9 : 10.5;
    if (narrow) spec.config.legend.labelFontSize = small;
    if (narrow) spec.config.title = { ...spec.config.title, fontSize: 11, limit: width - 20 };
    if (spec.hconcat && wrap && narrow) {
      spec.vconcat = spec.hconcat;
      delete spec.hconcat;
      for (const part of spec.vconcat) part.width = Math.max(80, width - 75 + more);
      return spec;
    }
    const beside = narrow ? Math.min(axes, 0.36 * width) : axes;
    const room = Math.max(50, width - beside - 25 - (parts.length - 1) * (spec.spacing || 0) + more);
    (spec.hconcat || [spec]).forEach((part, place) => { part.width = Math.floor(room * parts[place]); });
    if (narrow) spec.config.axis.labelLimit = beside - 12;
    if (narrow) Object.assign(spec.config.axis, { titleFontSize: small, labelFontSize: small });
    return spec;
  }

  function lightness() {
    const colour = getComputedStyle(host).color.match(/[\d.]+/g).map(Number);
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2];
  }

  const plain = value => JSON.parse(JSON.stringify(value));

  async function embed() {
    const width = host.clientWidth;
    if (shown) shown.finalize();
    shown = null;
    host.replaceChildren();
    if (!width || !model.get("spec").config) return;
    wide = width;
    const whole = JSON.stringify({ ...model.get("spec"), datasets: model.get("rows") });
    let spec, more = 0;
    const actions = { export: true, source: false, compiled: false, editor: false };
    const options = {
      renderer: "svg", actions, downloadFileName: "chart", tooltip: { theme: lightness() > 128 ? "dark" : "light" },
    };
    for (let turn = 0; turn < 3; turn++) {  // how wide letters beside the parts are is known when they are there
      spec = laid(JSON.parse(whole), width, more);
      if (shown) shown.finalize();
      shown = await vegaEmbed(host, spec, options);
      const left = width - host.querySelector("svg.marks").getAttribute("width");
      if (left >= 0 && left < 12) break;
      more += Math.floor(left) - 3;
    }
    describe();
    table();
    shown.view.addEventListener("click", (event, item) => {
      const pick = (spec.usermeta || {}).pick;
      if (!pick || !item || !item.datum) return;
      const value = item.mark.role === "axis-label" ? item.datum.value : item.datum[pick];
      if (value === undefined) return;
      model.set("picked", value);
      model.save_changes();
    });
    mark();
  }

  function describe() {
    const picture = host.querySelector("svg.marks");
    picture.setAttribute("role", "img");
    picture.setAttribute("aria-label", model.get("alt"));
  }

  function table() {  // the rows, to be saved beside the pictures
    const link = document.createElement("a");
    link.textContent = "Save as CSV";
    link.href = "#";
    link.download = "chart.csv";
    link.addEventListener("mousedown", () => {
      const rows = Object.values(model.get("rows"))[0] || [], names = Object.keys(rows[0] || {});
      const quoted = value => `"${String(value ?? "").replaceAll('"', '""')}"`;
      const lines = [names, ...rows.map(row => names.map(name => row[name]))].map(cells => cells.map(quoted).join(","));
      link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(lines.join("\n") + "\n");
    });
    host.querySelector(".vega-actions").append(link);
  }

  function mark() {
    if (!shown || !(model.get("spec").usermeta || {}).pick) return;
    shown.view.signal("picked", model.get("picked")).runAsync();
  }

  async function update() {
    if (!shown) return embed();
    for (const [name, rows] of Object.entries(model.get("rows"))) {
      try {
        shown.view.data(name, plain(rows));
      } catch {  // the specification that has it comes next
        return;
      }
    }
    await shown.view.runAsync();
    if (Math.abs(host.clientWidth - wide) > 8) await embed();
  }

  const spec = () => after(embed), rows = () => after(update), picked = () => after(mark);
  const alt = () => after(() => { if (shown) describe(); });
  model.on("change:spec", spec);
  model.on("change:rows", rows);
  model.on("change:picked", picked);
  model.on("change:alt", alt);
  const resized = new ResizeObserver(() => { if (Math.abs(host.clientWidth - wide) > 8) after(embed); });
  resized.observe(host);
  after(embed);
  return () => {
    resized.disconnect();
    for (const [name, call] of Object.entries({ spec, rows, picked, alt })) model.off(`change:${name}`, call);
    if (shown) shown.finalize();
  };
}

export default { render };
