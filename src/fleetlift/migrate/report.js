// Figures under the pointer. The plots carry their points and ready-made labels.
(() => {
  const tip = document.getElementById("tip");
  const clock = (t) => `${Math.floor(t / 60)}:${String(Math.floor(t % 60)).padStart(2, "0")}`;
  const before = (points, t) => {
    let low = 0, high = points.length - 1, found = null;
    while (low <= high) {
      const middle = (low + high) >> 1;
      if (points[middle][0] <= t) { found = points[middle]; low = middle + 1; } else high = middle - 1;
    }
    return found;
  };
  for (const plot of document.querySelectorAll("svg.plot")) {
    const { span, left, right } = plot.dataset;
    const series = JSON.parse(plot.dataset.points);
    const cursor = plot.querySelector(".cursor");
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * plot.viewBox.baseVal.width;
      const t = ((x - left) / (right - left)) * span;
      if (t < 0 || t > span) { cursor.style.visibility = "hidden"; tip.hidden = true; return; }
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible";
      const rows = series.map((s) => [s.name, before(s.points, t)]).filter(([, p]) => p).map(([n, p]) => `${n}  ${p[1]}`);
      tip.textContent = [clock(t), ...rows].join("\n"); tip.hidden = false;
      tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
    });
    plot.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; tip.hidden = true; });
  }
})();
