// One reading of the server's metrics, the same page that Prometheus reads.

/** Samples by name and labels. The server took them between `askedAt` and `readAt`. */
export class Reading {
  constructor(text, readAt, askedAt = readAt) {
    this.readAt = readAt;
    this.askedAt = askedAt;
    this.samples = text
      .split("\n")
      .filter((line) => line && !line.startsWith("#"))
      .map((line) => /^([a-z_]+)(?:\{(.*)\})? (\S+)/.exec(line))
      .filter(Boolean)
      .map(([, name, labels, value]) => ({ name, labels: labelsOf(labels ?? ""), value: Number(value) }));
  }

  /** The sum of the samples of this name that have these labels. */
  sum(name, labels = {}) {
    const wanted = Object.entries(labels);
    return this.samples
      .filter((each) => each.name === name && wanted.every(([key, value]) => each.labels[key] === value))
      .reduce((total, each) => total + each.value, 0);
  }

  /** The values that a label of this metric has. */
  values(name, label) {
    return [...new Set(this.samples.filter((each) => each.name === name).map((each) => each.labels[label]))];
  }
}

function labelsOf(text) {
  return Object.fromEntries([...text.matchAll(/(\w+)="([^"]*)"/g)].map(([, key, value]) => [key, value]));
}
