// The panel of slider.html: `data` is what pages.slider writes, `$` finds an element by its id.
function slide(data, $) {
  for (const name of data.patterns) $("pattern").add(new Option(name));
  const told = s => s.replace(/[&<>"']/g, c => "&#" + c.charCodeAt(0) + ";");
  const percent = s => s === "0" ? "dense" : isNaN(s) ? s : +(100 * s).toFixed(2) + " %";
  const share = s => isNaN(s) ? 1e-9 : +s;  // quantized and not pruned: next to the dense
  function chosen() {
    const tuned = $("tuned").checked, all = data.values;
    return all[$("pattern").value + "|" + (tuned ? "True" : "False")] || all[$("pattern").value + "|False"] || {};
  }
  function draw() {
    const curves = chosen(), first = Object.values(curves)[0] || {};
    const levels = Object.keys(first).sort((a, b) => share(a) - share(b)), slider = $("where");
    slider.max = levels.length - 1;
    const at = Math.min(+slider.value, levels.length - 1), level = levels[at];
    $("level").textContent = percent(level);
    slider.setAttribute("aria-valuetext", percent(level));
    const x = i => 44 + i * 560 / Math.max(1, levels.length - 1), y = v => 226 - 210 * v;
    let svg = `<text x="2" y="0">test accuracy, %</text>`, rows = `<tr><th>method</th><th>accuracy, %</th><th>${data.seeds > 1 ? `± std (n = ${data.seeds})` : ""}</th></tr>`;
    for (const v of [0, 0.25, 0.5, 0.75, 1])
      svg += `<line x1="44" x2="604" y1="${y(v)}" y2="${y(v)}" stroke="#e4e4e4"/>` +
        `<text x="38" y="${y(v) + 4}" text-anchor="end">${100 * v}</text>`;
    levels.forEach((l, i) => svg += `<text x="${x(i)}" y="246" text-anchor="middle">${told(percent(l))}</text>`);
    svg += `<line x1="${x(at)}" x2="${x(at)}" y1="16" y2="226" stroke="#888"/>`;
    for (const [method, [label, colour, dashes]] of Object.entries(data.methods)) {
      const curve = curves[method];
      if (!curve) { rows += `<tr><td>${told(label)}</td><td>failed</td><td></td></tr>`; continue; }
      const points = levels.map((l, i) => curve[l] ? `${x(i)},${y(curve[l][0])}` : "").join(" ");
      svg += `<polyline fill="none" stroke="${colour}" stroke-width="2" stroke-dasharray="${dashes}" points="${points}"/>`;
      if (!curve[level]) continue;
      const [mean, std] = curve[level];
      svg += `<circle cx="${x(at)}" cy="${y(mean)}" r="5" fill="${colour}" stroke="#fff"/>`;
      const sample = `<svg width="34" height="8" aria-hidden="true"><line x1="0" x2="34" y1="4" y2="4" stroke="${colour}" ` +
        `stroke-width="3" stroke-dasharray="${dashes}"/></svg>`;
      rows += `<tr><td>${sample} ${told(label)}</td><td data-method="${told(method)}">` +
        `${(100 * mean).toFixed(1)}</td><td>${std === null ? "" : (100 * std).toFixed(1)}</td></tr>`;
    }
    $("chart").innerHTML = svg;
    $("numbers").innerHTML = rows;
  }
  for (const id of ["where", "pattern", "tuned"]) $(id).addEventListener("input", draw);
  draw();
}
