(() => {
  "use strict";
  const { features, hues } = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const [search, status, list, shown] = ["search", "status", "list", "shown"].map($);
  const buttons = [...document.querySelectorAll(".choices button")];
  const links = [...list.querySelectorAll("a")];
  const place = new Map(features.map((feature, i) => [`#feature-${feature.id}`, i]));
  let emotion = "";
  let chosen = 0;

  // Everything from the data becomes a text node or an attribute that cannot run.
  const make = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  };
  const draw = (tag, attributes, ...children) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const hue = (name) => `c-${Object.hasOwn(hues, name) ? hues[name] : "slate"}`;
  const chip = (name) => make("span", { class: `emotion ${hue(name)}` }, make("i"), name);
  const pairs = (rows) => make("dl", { class: "statistics" },
    ...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));

  const histogram = ({ title, low, high, top, label, bars, ticks }) => {
    const [left, right, base, ceiling] = [8, 312, 108, 14];
    const x = (value) => left + ((value - low) / (high - low || 1)) * (right - left);
    const width = (right - left) / Math.max(1, bars.length);
    const parts = bars.map(([centre, height], i) => {
      const tall = (height / (top || 1)) * (base - ceiling);
      return draw("rect", {
        class: centre < 0 ? "down" : "up", x: left + i * width + 0.25, width: Math.max(0.5, width - 0.5),
        y: base - (height > 0 ? Math.max(1, tall) : 0), height: height > 0 ? Math.max(1, tall) : 0,
      });
    });
    parts.push(draw("line", { class: "axis", x1: left, y1: base, x2: right, y2: base }));
    for (const [value, text] of ticks) {
      parts.push(draw("text", { class: "tick", x: x(value), y: base + 14, "text-anchor": "middle" }, text));
    }
    return make("figure", {}, make("h4", {}, title),
      draw("svg", { class: "plot", viewBox: "0 0 320 126", role: "img", "aria-label": label }, ...parts));
  };

  const logits = (title, rows) => make("section", {}, make("h4", {}, title),
    make("ol", {}, ...rows.map(([token, value]) =>
      make("li", {}, make("code", {}, token), make("span", { class: "num" }, value)))));

  const related = ({ title, rows }) => make("section", {}, make("h4", {}, title),
    make("ol", {}, ...rows.map(([name, value, id]) => make("li", {},
      place.has(`#feature-${id}`) ? make("a", { href: `#feature-${id}` }, name) : make("span", {}, name),
      make("span", { class: "num" }, value)))));

  const text = ({ tokens, note, language }) => make("p", { class: "reading", lang: language, dir: "auto" },
    ...tokens.map((piece) => {
      if (typeof piece === "string") return piece;
      const [word, strength, value] = piece;
      const made = make("span", { class: "on", title: value }, word);
      made.style.setProperty("--a", strength);
      return made;
    }), make("small", {}, note));

  const texts = ({ title, open, rows }) => make("details", open ? { open: "" } : {},
    make("summary", {}, title), ...rows.map(text));

  const visible = () => links.filter((link) => !link.parentElement.hidden);
  const step = (by) => {
    const open = visible();
    return open[open.indexOf(links[chosen]) + by];
  };
  const turn = (name, by) => {
    const button = make("button", { type: "button" }, name);
    button.disabled = !step(by);
    button.addEventListener("click", () => step(by)?.click());
    return button;
  };

  const show = (index, focus) => {
    chosen = index;
    const feature = features[index];
    links.forEach((link, i) => {
      if (i === index) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
      link.tabIndex = i === index ? 0 : -1;
    });
    const heading = make("h2", { tabindex: "-1" }, `Feature ${feature.id}`);
    const parts = [make("header", {}, heading, ...feature.emotions.map(chip),
      feature.url && feature.url.startsWith("https://")
        ? make("a", { href: feature.url, rel: "noopener noreferrer" }, "on Neuronpedia") : null,
      make("span", { class: "turn push" }, turn("Previous", -1), turn("Next", 1)))];
    for (const label of feature.labels) {
      parts.push(make("p", { class: "label-text", dir: "auto" }, label.text));
      parts.push(make("small", {}, label.by), pairs(label.statistics));
    }
    if (!feature.facts.length) {
      parts.push(make("p", { class: "note" }, "No dashboard of this feature was given: there are no texts or charts to show."));
    } else {
      parts.push(make("h3", {}, "In the corpus"), pairs(feature.facts));
      if (feature.charts.length) parts.push(make("h3", {}, "Histograms"), make("div", { class: "charts" }, ...feature.charts.map(histogram)));
      if (feature.texts.length) {
        parts.push(make("section", { class: `texts ${hue(feature.emotions[0])}` },
          make("h3", {}, "Where it fires"), ...feature.texts.map(texts)));
      }
      parts.push(make("section", { class: "logits" }, make("h3", {}, "What it makes likelier, and less likely"), make("div", { class: "lists" },
        logits("Promoted tokens", feature.promotes), logits("Suppressed tokens", feature.suppresses))));
      if (feature.related.length) parts.push(make("h3", {}, "What fires with it"), make("div", { class: "lists" }, ...feature.related.map(related)));
    }
    shown.replaceChildren(...parts);
    links[index].scrollIntoView({ block: "nearest" });
    if (focus) {
      heading.focus({ preventScroll: true });
      shown.scrollIntoView({ block: "nearest" });
      if (shown.getBoundingClientRect().top < 0 || innerWidth <= 860) heading.scrollIntoView();
    }
  };

  const haystack = features.map((feature) => [feature.id, ...feature.labels.map((label) => label.text),
    ...feature.emotions, ...feature.promotes.map(([token]) => token)].join("\n").toLowerCase());
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    links.forEach((link, i) => {
      const wanted = !emotion || features[i].emotions.includes(emotion);
      link.parentElement.hidden = !(wanted && words.every((word) => haystack[i].includes(word)));
    });
    const open = visible();
    // Tab must reach the list even when the chosen feature is filtered out.
    const first = open.includes(links[chosen]) ? links[chosen] : open[0];
    for (const link of links) link.tabIndex = link === first ? 0 : -1;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.emotion === emotion));
    status.textContent = open.length ? `${open.length} of ${features.length} features` : "No feature matches.";
    const turns = shown.querySelectorAll(".turn button");
    turns.forEach((button, i) => { button.disabled = !step(i ? 1 : -1); });
  };

  search.addEventListener("input", filter);
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && visible().length) {
      event.preventDefault();
      visible()[0].focus();
    }
  });
  for (const button of buttons) {
    button.addEventListener("click", () => {
      emotion = button.dataset.emotion;
      filter();
    });
  }
  list.addEventListener("keydown", (event) => {
    const open = visible();
    const at = open.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: open.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    if (to < 0) search.focus();
    else open[to]?.focus();
  });
  // A click on the feature that is already in the address changes nothing there.
  list.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link && link.hash === location.hash) show(place.get(link.hash), true);
  });
  addEventListener("hashchange", () => {
    if (place.has(location.hash)) show(place.get(location.hash), true);
  });
  document.querySelector(".controls").hidden = false;
  show(place.get(location.hash) ?? 0, false);
  filter();
})();
