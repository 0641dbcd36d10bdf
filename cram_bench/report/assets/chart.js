// A chart of chart.html: `spec` is Vega-Lite's, `host` where it goes, `alt` what it shows.
async function draw(spec, host, alt) {
  if (!window.vegaEmbed) {
    const bytes = Uint8Array.from(atob(document.getElementById("vega").textContent), c => c.charCodeAt(0));
    const script = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
    await import(URL.createObjectURL(new Blob([script], { type: "text/javascript" })));
  }
  const width = Math.max(180, Math.min(760, host.clientWidth - 170));  // beside the axis, its labels, and the numbers
  for (const part of spec.vconcat || [spec]) part.width = width;
  spec.config.legend.columns = Math.max(1, Math.floor(width / 140));
  const actions = { export: true, source: false, compiled: false, editor: false };
  const { view } = await vegaEmbed(host, spec, { renderer: "svg", actions, downloadFileName: "chart" });
  host.view = view;
  const picture = host.querySelector("svg.marks"), slider = host.querySelector("input[type=range]");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", alt);
  if (!slider) return;
  const levels = spec.usermeta.levels, shown = slider.parentNode.appendChild(document.createElement("output"));
  const bound = new Set((spec.params || []).map(each => each.name));
  function tell() {
    const own = levels[bound.has("pattern") ? view.signal("pattern") : Object.keys(levels)[0]];
    shown.textContent = own[Math.min(slider.value, own.length - 1)];
    slider.setAttribute("aria-valuetext", shown.textContent);
  }
  for (const control of host.querySelectorAll("input, select")) control.addEventListener("input", () => setTimeout(tell));
  tell();
}
