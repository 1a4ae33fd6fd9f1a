package main

import "strings"

// nearest returns which of the known names somebody may have meant by another, or "" if it is like none of them.
func nearest(name string, known []string) string {
	plain := func(name string) string {
		return strings.Trim(strings.ReplaceAll(strings.ToLower(name), "_", "-"), "-")
	}
	given := plain(name)
	if len(given) > maxNameLength {
		return ""
	}
	best, least := "", max(2, len(given)/3)+1
	for _, candidate := range known {
		if d := distance(given, plain(candidate)); d < least {
			best, least = candidate, d
		}
	}
	return best
}

// distance returns how many bytes have to be put in, taken away or changed to make one text of another.
func distance(a, b string) int {
	row := make([]int, len(b)+1) // from the part of a that was looked at to each beginning of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			changed := diagonal
			if a[i] != b[j] {
				changed++
			}
			diagonal = row[j+1]
			row[j+1] = min(changed, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
