// Draws the panels of a page from the data in it. Wheel-free: drag to zoom, double click to go back.
(() => {
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const tone = at => css(`--t${at}`);
  const short = value => value == null ? "–" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") :
    `${+value.toPrecision(Math.abs(value) >= 100 ? 4 : 3)}`;
  const nearest = (u, series, at) => {
    const ys = u.data[series];
    if (series === 0 || ys[at] != null) return at;
    let left = at, right = at;
    while (left >= 0 && ys[left] == null) left--;
    while (right < ys.length && ys[right] == null) right++;
    if (left < 0 || right >= ys.length) return at;
    return u.data[0][at] - u.data[0][left] <= u.data[0][right] - u.data[0][at] ? left : right;
  };
  const overlay = p => u => {
    const {ctx} = u, {left, top, width, height} = u.bbox, dpr = devicePixelRatio;
    ctx.save();
    ctx.beginPath(); ctx.rect(left, top, width, height); ctx.clip();
    for (const c of p.curves) {
      if (!c.low) continue;
      ctx.globalAlpha = .16; ctx.fillStyle = tone(c.tone); ctx.beginPath();
      c.xs.forEach((x, i) => ctx.lineTo(u.valToPos(x, "x", true), u.valToPos(c.high[i], "y", true)));
      for (let i = c.xs.length - 1; i >= 0; i--)
        ctx.lineTo(u.valToPos(c.xs[i], "x", true), u.valToPos(c.low[i], "y", true));
      ctx.fill();
    }
    ctx.globalAlpha = 1; ctx.strokeStyle = ctx.fillStyle = css("--mark"); ctx.lineWidth = 1.2 * dpr;
    ctx.font = `${11 * dpr}px system-ui, sans-serif`;
    for (const m of p.marks) {
      const at = u.valToPos(m.at, m.axis, true);
      ctx.setLineDash([4 * dpr, 3 * dpr]); ctx.beginPath();
      if (m.axis === "x") {
        if (at < left || at > left + width) continue;
        ctx.moveTo(at, top); ctx.lineTo(at, top + height); ctx.stroke(); ctx.setLineDash([]);
        ctx.save(); ctx.translate(at - 4 * dpr, top + height - 6 * dpr); ctx.rotate(-Math.PI / 2);
        ctx.textAlign = "left"; ctx.fillText(m.text, 0, 0); ctx.restore();
      } else {
        ctx.moveTo(left, at); ctx.lineTo(left + width, at); ctx.stroke(); ctx.setLineDash([]);
        ctx.textAlign = "right"; ctx.fillText(m.text, left + width - 5 * dpr, at + (at - top < 16 * dpr ? 12 : -4) * dpr);
      }
    }
    ctx.restore();
  };
  const joined = p => {
    let ys = p.curves.map(c => c.ys);
    if (p.stacked) ys = ys.map((_, at) => p.curves[0].xs.map((_, i) => ys.slice(0, at + 1).reduce((s, v) => s + v[i], 0)));
    return uPlot.join(p.curves.map((c, at) => [c.xs, ys[at]]));
  };
  function plot(host, p) {
    const data = joined(p), xs = data[0], all = [xs[0], xs[xs.length - 1]];
    const order = p.curves.map((_, at) => at);
    let whole = !p.focus;
    const ends = () => whole ? all : p.focus[0];
    const yRange = (u, low, high) => !whole && p.focus ? p.focus[1] : p.y_range ||
      [Math.min(0, low ?? 0), (high || 1) * 1.06];
    const axis = {stroke: css("--ink"), grid: {stroke: css("--grid"), width: 1}, ticks: {stroke: css("--grid"), width: 1},
      font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 20};
    const series = order.map(at => {
      const c = p.curves[at];
      return {label: c.label, stroke: tone(c.tone), width: p.stacked ? 0.5 : c.width, dash: c.dash, spanGaps: true,
        paths: p.stacked ? uPlot.paths.stepped({align: 1}) : undefined,
        fill: p.stacked ? tone(c.tone) + "cc" : undefined,
        points: {show: c.dots, size: 6, fill: css("--page")},
        value: (u, v, si, i) => i == null ? "–" : short(p.stacked ? p.curves[at].ys[i] : v)};
    });
    if (p.stacked) { series.reverse(); data.splice(1, data.length - 1, ...data.slice(1).reverse()); }
    const seen = value => value == null ? "–" : short(value) +
      (p.also ? ` (${short(value * p.also[0])} ${p.also[1]})` : "");
    const opts = {
      width: host.clientWidth || 320, height: 300, series: [{label: p.x, value: (u, v) => seen(v)}, ...series],
      scales: {x: {time: false, distr: p.log_x ? 3 : 1}, y: {range: yRange}},
      axes: [{...axis, label: p.x, ...(p.log_x ? {} : {values: (u, vs) => vs.map(short)})},
        {...axis, label: p.y, size: 58, values: (u, vs) => vs.map(short)}],
      cursor: {dataIdx: nearest, sync: p.sync ? {key: p.sync} : undefined, bind: {dblclick: () => () => reset()},
        drag: {x: true, y: false}},
      legend: {markers: {width: 3, dash: (u, at) => u.series[at].dash?.length ? "dashed" : "solid"}},
      hooks: {drawAxes: [overlay(p)]},
    };
    const u = new uPlot(opts, data, host);
    const reset = () => { u.setScale("x", {min: ends()[0], max: ends()[1]}); };
    reset();
    if (p.focus) {
      const button = document.createElement("button");
      const name = () => { button.textContent = whole ? "Zoom to where they differ" : "Show the whole curves"; };
      button.onclick = () => { whole = !whole; name(); reset(); };
      name(); host.append(button);
    }
    host.plotted = u;
    return u;
  }
  const hosts = [...document.querySelectorAll(".plot")];
  const plots = new Map();
  const drawAll = () => hosts.forEach(host => {
    plots.get(host)?.destroy();
    host.querySelector("button")?.remove();
    plots.set(host, plot(host, JSON.parse(host.querySelector("script").textContent)));
  });
  drawAll();
  new ResizeObserver(() => plots.forEach((u, host) =>
    host.clientWidth && host.clientWidth !== u.width && u.setSize({width: host.clientWidth, height: 300}))).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
